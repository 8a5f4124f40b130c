CREATE TABLE contacts (email text PRIMARY KEY, name text NOT NULL);
CREATE TABLE imports (sha256 text PRIMARY KEY, file text NOT NULL, batch_id bigint NOT NULL);
