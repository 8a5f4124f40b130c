-- A pause that has ended by itself is not there any more for batchq.resume: nothing changes, and nothing is noted.

CREATE OR REPLACE FUNCTION batchq.resume(queue text DEFAULT NULL, kind text DEFAULT NULL, reason text DEFAULT NULL, actor text DEFAULT NULL)
RETURNS boolean
LANGUAGE plpgsql
AS $$
DECLARE
  was_paused boolean;
BEGIN
  DELETE FROM batchq.pauses p
  WHERE p.queue IS NOT DISTINCT FROM resume.queue
    AND p.kind IS NOT DISTINCT FROM resume.kind
  RETURNING p.until IS NULL OR p.until > now() INTO was_paused;
  IF was_paused IS NOT TRUE THEN
    RETURN false;
  END IF;
  PERFORM batchq.note_verb('resume', 0, NULL, queue, kind, '{}', reason, actor);
  RETURN true;
END
$$;
