-- What is wrong with flows and with batches that are spread, as far as they are live, or finished since %(since)s: a row
-- each, of what, batch and detail.
SELECT 'order', f.batch_id, format('began beside %%s of the batches that it waits for', f.unended)
FROM fan_ins f
WHERE f.unended > 0
UNION ALL
SELECT 'order', b.id, format('%%s, and has begun', b.status)
FROM batchq.batches_live b
WHERE b.status = 'waiting' AND EXISTS (SELECT FROM fan_ins f WHERE f.batch_id = b.id)
UNION ALL
SELECT 'counters', s.id, format('%%s, %%s done and %%s failed of %%s items: its bar is at %%s %%%%', s.status, s.items_done,
                                s.items_failed, s.items_total, s.progress_percent)
FROM batchq.status s
WHERE s.id IN (SELECT id FROM batchq.batches_live WHERE spread IS NOT NULL
               UNION ALL
               SELECT id FROM batchq.batches_finished WHERE spread IS NOT NULL AND finished_at >= to_timestamp(%(since)s))
  AND (s.progress_percent > 100 OR s.progress_percent < 100 AND s.status = 'completed')
UNION ALL
SELECT 'counters', p.batch_id, format('waits for %%s parts, and has %%s', b.needs_left, count(*))
FROM batchq.parts p
JOIN batchq.batches_live b ON b.id = p.batch_id AND b.status = 'waiting'
WHERE p.part_id IS NOT NULL AND NOT p.is_gathered
GROUP BY p.batch_id, b.needs_left
HAVING count(*) <> b.needs_left
LIMIT 200
