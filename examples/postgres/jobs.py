"""What the executables have in common: the connection, and the table of the jobs."""

import os

import psycopg

DATABASE_URL = os.environ.get("DATABASE_URL", "postgresql://127.0.0.1:5432/postgres")

# Put your own columns in the place of `what`. The view says in one word how it stands with a job.
TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    queue text NOT NULL,
    what text NOT NULL,
    due timestamptz NOT NULL DEFAULT now(),  -- it waits for this
    tries integer NOT NULL DEFAULT 0,        -- how often it was taken, three times at most
    taken_until timestamptz,                 -- who took it sets this anew, for as long as it lives
    done boolean NOT NULL DEFAULT false,
    error text
);
CREATE INDEX IF NOT EXISTS jobs_not_done ON jobs (queue, id) WHERE NOT done;

CREATE OR REPLACE VIEW job_states AS
SELECT id, queue, error,
    CASE
        WHEN done THEN 'done'
        WHEN taken_until > now() THEN 'in hand'
        WHEN tries >= 3 THEN 'aside'
        WHEN due > now() THEN 'later'
        ELSE 'waiting'
    END AS state
FROM jobs;

CREATE OR REPLACE FUNCTION tell_of_jobs() RETURNS trigger LANGUAGE plpgsql AS
    $$BEGIN PERFORM pg_notify('jobs', ''); RETURN NULL; END$$;
CREATE OR REPLACE TRIGGER tell_of_jobs AFTER INSERT OR UPDATE OR DELETE ON jobs
    FOR EACH STATEMENT EXECUTE FUNCTION tell_of_jobs();
"""


def connect() -> psycopg.Connection:
    return psycopg.connect(DATABASE_URL, autocommit=True)
