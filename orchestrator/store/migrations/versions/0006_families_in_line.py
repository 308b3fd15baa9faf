"""A family that stands in line for a lock more than once is let in together, and keeps itself out of no circle."""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"

_LOCKS = """
CREATE OR REPLACE FUNCTION orchestrator.locks_1(
    p_run text, p_locks json, p_unlocks json, p_now timestamptz
) RETURNS jsonb
LANGUAGE plpgsql AS $$
DECLARE
    v_unlocks constant text[] := ARRAY(SELECT json_array_elements_text(coalesce(p_unlocks, '[]')));
    v_posts jsonb := '[]';
    v_name text;
    v_id bigint;
    v_handle text;
    v_key text;
    v_path text[];
    v_next text;
    v_granted record;
    v_family text[];
BEGIN
    -- One transaction at a time for each name, in the order of names; before any row of work is touched.
    FOR v_name IN
        SELECT l.name FROM orchestrator.locks l WHERE l.run_id = p_run AND l.handle = ANY (v_unlocks)
        UNION SELECT a.name FROM json_to_recordset(coalesce(p_locks, '[]')) AS a (name text) ORDER BY 1
    LOOP
        PERFORM pg_advisory_xact_lock(hashtextextended('orchestrator.lock ' || v_name, 0));
    END LOOP;
    -- The row that goes gives the lock to the run that waits longest, unless another row still holds it, and with it to
    -- whatever else that run and the children below it have in the line: a family does not keep itself out.
    FOR v_name IN DELETE FROM orchestrator.locks WHERE run_id = p_run AND handle = ANY (v_unlocks) RETURNING name LOOP
        SELECT w.run_id INTO v_next FROM orchestrator.locks w
        WHERE w.name = v_name
          AND NOT EXISTS (SELECT FROM orchestrator.locks h WHERE h.name = v_name AND h.granted_at IS NOT NULL)
        ORDER BY w.id LIMIT 1;
        CONTINUE WHEN NOT FOUND;
        FOR v_granted IN
            WITH RECURSIVE down (id) AS (
                SELECT v_next
                UNION
                SELECT r.id FROM down JOIN orchestrator.runs r ON r.parent_id = down.id AND r.root_id <> r.id
            )
            UPDATE orchestrator.locks l SET granted_at = p_now FROM down
            WHERE l.name = v_name AND l.run_id = down.id AND l.granted_at IS NULL
            RETURNING l.run_id, l.key
        LOOP
            v_posts := v_posts || jsonb_build_object('run', v_granted.run_id, 'arrival', jsonb_build_object(
                'e', 'outcome', 'key', v_granted.key, 'role', 'do', 'attempt', 1, 'verdict', 'succeeded'));
        END LOOP;
    END LOOP;
    -- This run and the parents above it, which do not keep it out.
    IF p_locks IS NOT NULL THEN
        WITH RECURSIVE up (id, parent_id) AS (
            SELECT id, CASE WHEN root_id <> id THEN parent_id END FROM orchestrator.runs WHERE id = p_run
            UNION ALL
            SELECT r.id, CASE WHEN r.root_id <> r.id THEN r.parent_id END
            FROM up JOIN orchestrator.runs r ON r.id = up.parent_id
        )
        SELECT array_agg(id) INTO v_family FROM up;
    END IF;
    FOR v_handle, v_key, v_name IN
        SELECT a.handle, a.key, a.name FROM json_to_recordset(p_locks) AS a (handle text, key text, name text)
    LOOP
        INSERT INTO orchestrator.locks (name, run_id, handle, key, asked_at)
        VALUES (v_name, p_run, v_handle, v_key, p_now) RETURNING id INTO v_id;
        v_path := NULL;
        -- Free, or held by this run itself or by a parent of it.
        UPDATE orchestrator.locks l SET granted_at = p_now WHERE l.id = v_id AND (
            NOT EXISTS (SELECT FROM orchestrator.locks o WHERE o.name = v_name AND o.id < v_id)
            OR EXISTS (SELECT FROM orchestrator.locks o
                       WHERE o.name = v_name AND o.granted_at IS NOT NULL AND o.run_id = ANY (v_family)));
        IF NOT FOUND THEN
            -- It has to wait.  One transaction at a time closes an edge of the graph of who waits for whom, so that
            -- each circle is seen by the one that would close it.
            PERFORM pg_advisory_xact_lock(hashtextextended('orchestrator.locks', 0));
            WITH RECURSIVE ahead (run_id, path) AS (
                SELECT l.run_id, ARRAY[l.run_id || ' (' || l.name || ')']
                FROM orchestrator.locks l WHERE l.name = v_name AND l.id < v_id AND l.run_id <> ALL (v_family)
                UNION ALL
                SELECT l.run_id, a.path || (l.run_id || ' (' || l.name || ')')
                FROM ahead a
                JOIN orchestrator.locks w ON w.run_id = a.run_id AND w.granted_at IS NULL
                JOIN orchestrator.locks l ON l.name = w.name AND l.id < w.id
                WHERE a.run_id <> p_run AND cardinality(a.path) < 20
                  AND NOT (l.run_id || ' (' || l.name || ')') = ANY (a.path)
            )
            SELECT a.path INTO v_path FROM ahead a WHERE a.run_id = p_run ORDER BY cardinality(a.path) LIMIT 1;
            CONTINUE WHEN v_path IS NULL;
            DELETE FROM orchestrator.locks WHERE id = v_id;
        END IF;
        v_posts := v_posts || jsonb_build_object('run', p_run, 'arrival', jsonb_strip_nulls(jsonb_build_object(
            'e', 'outcome', 'key', v_key, 'role', 'do', 'attempt', 1,
            'verdict', CASE WHEN v_path IS NULL THEN 'succeeded' ELSE 'rejected' END,
            'error', CASE WHEN v_path IS NOT NULL THEN jsonb_build_object('type', 'DeadlockError', 'message',
                'lock ' || v_name || ' would never be free: it is waited for behind '
                || array_to_string(v_path, ', which waits behind ')) END)));
    END LOOP;
    RETURN v_posts;
END $$
"""


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(_LOCKS)
