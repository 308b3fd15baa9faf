-- Runs, journal, work, arrivals, incarnations, drainers; then the functions of the hot path, a round trip each.

CREATE FUNCTION orchestrator.now() RETURNS timestamptz LANGUAGE sql STABLE
    AS 'SELECT statement_timestamp()';

CREATE TABLE orchestrator.runs (
    id text PRIMARY KEY,
    saga text NOT NULL,
    version integer NOT NULL,
    state text NOT NULL DEFAULT 'pending',
    input jsonb NOT NULL,
    output jsonb,
    error jsonb,
    left_effects jsonb NOT NULL DEFAULT '[]',
    parked jsonb NOT NULL DEFAULT '[]',
    published jsonb,
    tags jsonb NOT NULL DEFAULT '{}',
    parent_id text,
    root_id text NOT NULL,
    queue text NOT NULL,
    priority smallint NOT NULL DEFAULT 0 CHECK (priority BETWEEN 0 AND 9),
    position integer NOT NULL DEFAULT 0,
    past_pivot boolean NOT NULL DEFAULT false,
    link integer NOT NULL DEFAULT 0,
    since integer NOT NULL DEFAULT 0,
    started_at timestamptz NOT NULL,
    deadline_at timestamptz,
    finished_at timestamptz,
    -- One short expression: Postgres reads the text of every CHECK again for each statement that writes the table.
    CONSTRAINT runs_state CHECK (CASE WHEN finished_at IS NULL
        THEN state ~ '^(pending|running|paused|compensating|parked)$'
        ELSE state ~ '^(completed|failed|compensated|cancelled|terminated|continued)$' END)
) WITH (fillfactor = 70);
CREATE INDEX runs_by_start ON orchestrator.runs (started_at);
CREATE INDEX runs_by_tag ON orchestrator.runs USING gin (tags jsonb_path_ops) WHERE tags <> '{}';

CREATE TABLE orchestrator.journal (
    run_id text NOT NULL,
    seq integer NOT NULL,
    at timestamptz NOT NULL,
    entries json NOT NULL,
    PRIMARY KEY (run_id, seq)
);

CREATE TABLE orchestrator.arrivals (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    run_id text NOT NULL,
    at timestamptz NOT NULL DEFAULT orchestrator.now(),
    arrival json NOT NULL
);
CREATE INDEX arrivals_by_run ON orchestrator.arrivals (run_id, id);

CREATE TABLE orchestrator.work (
    run_id text NOT NULL,
    key text NOT NULL,
    role text NOT NULL CHECK (role ~ '^(turn|do|once|probe|undo)$'),
    target text NOT NULL,
    queue text NOT NULL,
    task text NOT NULL DEFAULT '',
    priority smallint NOT NULL DEFAULT 0,
    due_at timestamptz NOT NULL,
    attempt integer NOT NULL DEFAULT 0,
    call json,
    reserved_at timestamptz,
    fence bigint,
    incarnation bigint,
    child integer,
    begun_at timestamptz,
    deadline_at timestamptz,
    expires_at timestamptz,
    details json,
    stop boolean NOT NULL DEFAULT false,
    gate text,
    PRIMARY KEY (run_id, key)
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000);
CREATE INDEX work_due ON orchestrator.work (queue, priority DESC, due_at) WHERE fence IS NULL;
CREATE INDEX work_begun ON orchestrator.work (incarnation) WHERE fence IS NOT NULL;
-- Who stands in line at a gate is due in a thousand years: it is out of the way there, and in order.
CREATE INDEX work_gate ON orchestrator.work (gate, due_at) WHERE gate IS NOT NULL;

CREATE TABLE orchestrator.gates (
    name text PRIMARY KEY,
    next_at timestamptz NOT NULL DEFAULT '-infinity'
) WITH (fillfactor = 50);

CREATE TABLE orchestrator.pauses (
    kind text NOT NULL CHECK (kind ~ '^(saga|queue)$'),
    name text NOT NULL,
    by text NOT NULL,
    reason text NOT NULL,
    at timestamptz NOT NULL,
    lifted boolean NOT NULL DEFAULT false,
    swept_to text NOT NULL DEFAULT '',
    sweeps integer NOT NULL DEFAULT 0,
    PRIMARY KEY (kind, name)
);

CREATE TABLE orchestrator.paused_runs (
    saga text NOT NULL,
    run_id text NOT NULL,
    PRIMARY KEY (saga, run_id)
);

CREATE TABLE orchestrator.locks (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL,
    run_id text NOT NULL,
    handle text NOT NULL,
    key text NOT NULL,
    asked_at timestamptz NOT NULL,
    granted_at timestamptz,
    UNIQUE (run_id, handle)
);
CREATE INDEX locks_by_name ON orchestrator.locks (name, id);

CREATE TABLE orchestrator.incarnations (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    node text NOT NULL,
    host text NOT NULL,
    pid integer NOT NULL,
    queues text[] NOT NULL,
    targets text[] NOT NULL,
    slots integer NOT NULL,
    beats bigint NOT NULL DEFAULT 0,
    started_at timestamptz NOT NULL DEFAULT orchestrator.now(),
    seen_at timestamptz NOT NULL DEFAULT orchestrator.now(),
    dead_at timestamptz
) WITH (fillfactor = 50);
CREATE INDEX incarnations_alive ON orchestrator.incarnations (id) WHERE dead_at IS NULL;

CREATE UNLOGGED TABLE orchestrator.drainers (
    incarnation bigint NOT NULL,
    child integer NOT NULL,
    queues text[] NOT NULL,
    PRIMARY KEY (incarnation, child)
);

CREATE VIEW orchestrator.history AS
SELECT j.run_id, j.seq, e.n, j.at, e.entry ->> 'e' AS kind, e.entry ->> 'key' AS key, e.entry
FROM orchestrator.journal j CROSS JOIN LATERAL json_array_elements(j.entries) WITH ORDINALITY AS e (entry, n);

-- starting runs, and who is to be rung for
CREATE FUNCTION orchestrator.rings_1(p_queue text, p_rows integer) RETURNS integer LANGUAGE plpgsql AS $$
BEGIN
    -- A doorbell for each new row, as long as there are slots that do not drain (index incarnations_alive).
    RETURN greatest(0, least(p_rows,
        (SELECT coalesce(sum(slots), 0) FROM orchestrator.incarnations WHERE dead_at IS NULL AND p_queue = ANY (queues))
        - (SELECT count(*) FROM orchestrator.drainers d JOIN orchestrator.incarnations i ON i.id = d.incarnation
           WHERE i.dead_at IS NULL AND p_queue = ANY (d.queues))));
END $$;

CREATE FUNCTION orchestrator.start_runs_1(p_runs json, p_now timestamptz)
RETURNS TABLE (run_id text, started_at timestamptz) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    v_now constant timestamptz := coalesce(p_now, orchestrator.now());
BEGIN
    -- One row for the run and one for its first turn, or nothing at all if the id is taken (primary key of runs).
    RETURN QUERY
    WITH run AS (
        INSERT INTO orchestrator.runs (
            id, saga, version, input, queue, priority, root_id, parent_id, tags, started_at, deadline_at)
        SELECT r.id, r.saga, r.version, r.input, r.queue, r.priority, coalesce(r.root, r.id), r.parent,
            coalesce(r.tags, '{}'), t.start, t.start + make_interval(secs => r.deadline)
        FROM json_to_recordset(p_runs) AS r (
            id text, saga text, version integer, input jsonb, queue text, priority smallint, parent text,
            root text, tags jsonb, delay float8, eta timestamptz, deadline float8)
        CROSS JOIN LATERAL (SELECT greatest(v_now + make_interval(secs => r.delay), r.eta) AS start) AS t
        ORDER BY r.id
        ON CONFLICT (id) DO NOTHING RETURNING id, saga, version, queue, priority, started_at
    ), turn AS (
        INSERT INTO orchestrator.work (run_id, key, role, target, queue, priority, due_at)
        SELECT id, '', 'turn', saga || '@' || version, queue, priority, started_at FROM run
    )
    SELECT id, started_at FROM run;
END $$;

CREATE PROCEDURE orchestrator.start_and_look_1(
    p_runs json, p_queue text, p_now timestamptz, INOUT p_started text[], INOUT p_rings integer
) LANGUAGE plpgsql AS $$
DECLARE
    v_due integer;
BEGIN
    SELECT array_agg(s.run_id), count(*) FILTER (WHERE s.started_at <= coalesce(p_now, orchestrator.now()))
    INTO p_started, v_due FROM orchestrator.start_runs_1(p_runs, p_now) AS s;
    COMMIT;
    -- Read after the commit: a drainer that leaves meanwhile looks again and sees the new rows.
    p_rings := CASE WHEN v_due = 0 THEN 0 ELSE orchestrator.rings_1(p_queue, v_due) END;
END $$;

-- taking work
CREATE FUNCTION orchestrator.take_1(
    p_queues text[], p_targets text[], p_short text[], p_incarnation bigint, p_child integer, p_fences bigint[],
    p_reservation interval, p_now timestamptz
) RETURNS TABLE (
    run_id text, key text, role text, target text, queue text, task text, attempt integer, call json, fence bigint,
    deadline_at timestamptz, now timestamptz, saga text, version integer, run_queue text, input jsonb,
    started_at timestamptz, run_deadline_at timestamptz, priority smallint, "position" integer, state text,
    parent text, link integer, since integer
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    v_now constant timestamptz := coalesce(p_now, orchestrator.now());
    v_limit constant integer := cardinality(p_fences);
    v_queue text;
    v_taken integer := 0;
    v_begun boolean := false;
BEGIN
    -- Index work_due, once per level of priority that can be there, so that what sleeps is never looked at.
    FOR v_level IN REVERSE CASE WHEN EXISTS (
        SELECT FROM orchestrator.work
        WHERE fence IS NULL AND queue = ANY (p_queues) AND priority > 0 AND due_at <= v_now
    ) THEN 9 ELSE 0 END .. 0 LOOP
        FOREACH v_queue IN ARRAY p_queues LOOP
            -- Rows that somebody else holds are skipped, rows that nobody here can do as well.  What is begun and not
            -- run burns an attempt if the process dies: a step begins alone, unless it is known to be short.
            FOR run_id, key, role, target, queue, task, attempt, call, fence, deadline_at, now, saga, version,
                run_queue, input, started_at, run_deadline_at, priority, "position", state, parent, link, since
            IN
                WITH due AS MATERIALIZED (
                    SELECT d.run_id, d.key, d.due_at, d.role = 'turn' AS turn, d.task = ANY (p_short) AS short
                    FROM orchestrator.work d
                    WHERE d.fence IS NULL AND d.queue = v_queue AND d.priority = v_level AND d.due_at <= v_now
                      AND (d.reserved_at IS NULL OR d.reserved_at < v_now - p_reservation)
                      AND d.target = ANY (p_targets)
                    ORDER BY d.due_at LIMIT v_limit - v_taken FOR UPDATE SKIP LOCKED
                ), chosen AS MATERIALIZED (
                    SELECT c.* FROM (SELECT due.*, v_taken + row_number() OVER (ORDER BY due_at) AS n,
                        bool_and(turn OR short) OVER (ORDER BY due_at ROWS UNBOUNDED PRECEDING) AS short_so_far
                        FROM due) AS c
                    WHERE c.short_so_far OR c.n = 1
                ), taken AS (
                    UPDATE orchestrator.work u SET
                        reserved_at = v_now, incarnation = p_incarnation, child = p_child,
                        begun_at = CASE WHEN NOT c.turn THEN v_now END,
                        fence = CASE WHEN NOT c.turn THEN p_fences[c.n] END,
                        attempt = u.attempt + (NOT c.turn)::integer,
                        deadline_at = CASE WHEN NOT c.turn
                            THEN v_now + make_interval(secs => (u.call ->> 't')::float8) END,
                        expires_at = CASE WHEN NOT c.turn THEN v_now + make_interval(
                            secs => least((u.call ->> 't')::float8 + 5, (u.call ->> 'h')::float8)) END
                    FROM chosen c WHERE u.run_id = c.run_id AND u.key = c.key
                    RETURNING u.*, c.turn, c.n
                )
                SELECT t.run_id, t.key, t.role, t.target, t.queue, t.task, t.attempt, t.call, t.fence, t.deadline_at,
                    v_now, r.saga, r.version, r.queue, r.input, r.started_at, r.deadline_at, r.priority, r.position,
                    r.state, CASE WHEN r.root_id <> r.id THEN r.parent_id END, r.link, r.since
                FROM taken t LEFT JOIN orchestrator.runs r ON t.turn AND r.id = t.run_id ORDER BY t.n
            LOOP
                v_taken := v_taken + 1;
                v_begun := v_begun OR fence IS NOT NULL;
                RETURN NEXT;
            END LOOP;
            EXIT WHEN v_taken >= v_limit OR v_begun;
        END LOOP;
        EXIT WHEN v_taken >= v_limit OR v_begun;
    END LOOP;
    -- A reservation that a crash of the server forgets is only taken again.
    IF NOT v_begun THEN
        PERFORM set_config('synchronous_commit', 'off', true);
    END IF;
END $$;

-- committing turns
CREATE FUNCTION orchestrator.post_1(p_posts jsonb, p_now timestamptz) RETURNS text[] LANGUAGE plpgsql AS $$
DECLARE
    v_post record;
    v_queue text;
    v_queues text[] := '{}';
BEGIN
    -- An arrival for each of these runs, and its turn due; in the order of their ids.  Returns the queues to ring.
    FOR v_post IN
        SELECT r.id, r.queue, r.priority, p.arrival,
            CASE WHEN p.anyone OR r.state = 'compensating' OR r.finished_at IS NOT NULL THEN '*'
                 ELSE r.saga || '@' || r.version END AS target
        FROM jsonb_to_recordset(p_posts) AS p (run text, arrival jsonb, anyone boolean)
        JOIN orchestrator.runs r ON r.id = p.run ORDER BY r.id
    LOOP
        INSERT INTO orchestrator.arrivals (run_id, arrival) VALUES (v_post.id, v_post.arrival);
        INSERT INTO orchestrator.work AS w (run_id, key, role, target, queue, priority, due_at)
        VALUES (v_post.id, '', 'turn', v_post.target, v_post.queue, v_post.priority, p_now)
        ON CONFLICT (run_id, key) DO UPDATE SET
            target = CASE WHEN EXCLUDED.target = '*' THEN EXCLUDED.target ELSE w.target END,
            due_at = least(w.due_at, EXCLUDED.due_at), reserved_at = NULL, incarnation = NULL, child = NULL
        RETURNING queue INTO v_queue;
        v_queues := v_queues || v_queue;
    END LOOP;
    RETURN v_queues;
END $$;

CREATE FUNCTION orchestrator.children_1(p_run text, p_children json, p_now timestamptz) RETURNS jsonb
LANGUAGE plpgsql AS $$
DECLARE
    v_root constant text := (SELECT root_id FROM orchestrator.runs WHERE id = p_run);
    v_posts jsonb;
BEGIN
    -- Children are started as any run.  An id that somebody else has taken fails the child, not its parent.
    SELECT jsonb_agg(jsonb_build_object('run', p_run, 'arrival', jsonb_build_object(
        'e', 'outcome', 'key', c ->> 'key', 'role', 'do', 'attempt', 1, 'verdict', 'rejected', 'error',
        jsonb_build_object('type', 'ConflictError', 'message', 'run ' || (c ->> 'id') || ' exists and is no child'))))
    INTO v_posts
    FROM json_array_elements(p_children) AS c
    LEFT JOIN orchestrator.start_runs_1(
        (SELECT json_agg((n::jsonb - 'key') || jsonb_build_object('parent', p_run, 'root', v_root))
         FROM json_array_elements(p_children) AS n), p_now) AS s ON s.run_id = c ->> 'id'
    WHERE s.run_id IS NULL;
    RETURN coalesce(v_posts, '[]');
END $$;

CREATE FUNCTION orchestrator.locks_1(p_run text, p_locks json, p_unlocks json, p_now timestamptz) RETURNS jsonb
LANGUAGE plpgsql AS $$
DECLARE
    v_unlocks constant text[] := ARRAY(SELECT json_array_elements_text(coalesce(p_unlocks, '[]')));
    v_posts jsonb := '[]';
    v_name text;
    v_id bigint;
    v_handle text;
    v_key text;
    v_path text[];
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
    -- The row that goes gives the lock to the one that waits longest, unless another row still holds it.
    FOR v_name IN DELETE FROM orchestrator.locks WHERE run_id = p_run AND handle = ANY (v_unlocks) RETURNING name LOOP
        UPDATE orchestrator.locks l SET granted_at = p_now
        WHERE l.id = (SELECT min(w.id) FROM orchestrator.locks w WHERE w.name = v_name)
          AND NOT EXISTS (SELECT FROM orchestrator.locks h WHERE h.name = v_name AND h.granted_at IS NOT NULL)
        RETURNING l.run_id, l.key INTO v_granted;
        IF FOUND THEN
            v_posts := v_posts || jsonb_build_object('run', v_granted.run_id, 'arrival', jsonb_build_object(
                'e', 'outcome', 'key', v_granted.key, 'role', 'do', 'attempt', 1, 'verdict', 'succeeded'));
        END IF;
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
                FROM orchestrator.locks l WHERE l.name = v_name AND l.id < v_id
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
END $$;

CREATE FUNCTION orchestrator.continue_1(p_run text, p_continue json, p_now timestamptz) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_old constant text := p_run || '~' || ((SELECT link FROM orchestrator.runs WHERE id = p_run) + 1);
    v_seed constant json := p_continue -> 'seed';
BEGIN
    -- The link that ends keeps its journal under an id of its own; the caller's id goes on with an empty one.
    -- Positions go on counting, so that nobody takes a turn of the old link for one of the new.
    INSERT INTO orchestrator.runs (id, saga, version, state, input, left_effects, published, tags, parent_id, root_id,
        queue, priority, position, past_pivot, link, since, started_at, deadline_at, finished_at)
    SELECT v_old, saga, version, 'continued', input, p_continue -> 'left', published, tags, id, v_old,
        queue, priority, position, past_pivot, link, since, started_at, deadline_at, p_now
    FROM orchestrator.runs WHERE id = p_run;
    UPDATE orchestrator.journal SET run_id = v_old WHERE run_id = p_run;
    UPDATE orchestrator.runs SET version = (p_continue ->> 'version')::integer, input = (p_continue -> 'input')::jsonb,
        state = CASE WHEN v_seed IS NULL THEN 'pending' ELSE 'running' END, past_pivot = false, left_effects = '[]',
        link = link + 1, since = position, started_at = p_now,
        position = position + CASE WHEN v_seed IS NULL THEN 0 ELSE 1 END
    WHERE id = p_run;
    IF v_seed IS NOT NULL THEN
        INSERT INTO orchestrator.journal (run_id, seq, at, entries)
        SELECT id, since, p_now, v_seed FROM orchestrator.runs WHERE id = p_run;
    END IF;
END $$;

CREATE FUNCTION orchestrator.commit_more_1(
    p_run text, p_more json, p_incarnation bigint, p_child integer, p_now timestamptz,
    OUT left_here integer, OUT posted text[]
) LANGUAGE plpgsql AS $$
DECLARE
    v_holds constant boolean := coalesce((p_more ->> 'holds')::boolean, false);
    v_wake constant timestamptz := (p_more ->> 'wake')::timestamptz;
    v_posts jsonb := coalesce(p_more -> 'posts', '[]');
    v_withdraw text[];
    v_consumed bigint[];
    v_count integer;
BEGIN
    left_here := 0;
    posted := '{}';
    IF p_more -> 'locks' IS NOT NULL OR p_more -> 'unlocks' IS NOT NULL THEN
        -- Before any row of work: who has the lock of a name gives turns to other runs.
        v_posts := v_posts || orchestrator.locks_1(p_run, p_more -> 'locks', p_more -> 'unlocks', p_now);
    END IF;
    IF p_more -> 'withdraw' IS NOT NULL THEN
        v_withdraw := ARRAY(SELECT json_array_elements_text(p_more -> 'withdraw'));
        -- Only what no committed begin names may be withdrawn; whoever began it is told to stop.
        WITH gone AS (
            DELETE FROM orchestrator.work WHERE run_id = p_run AND key = ANY (v_withdraw) AND fence IS NULL
            RETURNING key
        )
        INSERT INTO orchestrator.arrivals (run_id, arrival)
        SELECT p_run, json_build_object('e', 'withdrawn', 'key', key) FROM gone;
        GET DIAGNOSTICS left_here = ROW_COUNT;
        UPDATE orchestrator.work SET stop = true WHERE run_id = p_run AND key = ANY (v_withdraw);
    END IF;
    IF (p_more ->> 'ended')::boolean THEN
        DELETE FROM orchestrator.work WHERE run_id = p_run AND (key <> '' OR NOT v_holds);
    END IF;
    IF p_more -> 'children' IS NOT NULL THEN
        v_posts := v_posts || orchestrator.children_1(p_run, p_more -> 'children', p_now);
    END IF;
    -- Turn rows in the order of their runs' ids: this run's own has its place between those that it posts to.
    IF v_posts <> '[]' THEN
        INSERT INTO orchestrator.arrivals (run_id, arrival)
        SELECT p_run, p -> 'arrival' FROM jsonb_array_elements(v_posts) AS p WHERE p ->> 'run' = p_run;
        GET DIAGNOSTICS v_count = ROW_COUNT;
        left_here := left_here + v_count;
        posted := orchestrator.post_1(
            (SELECT jsonb_agg(p) FROM jsonb_array_elements(v_posts) AS p WHERE p ->> 'run' < p_run), p_now);
    END IF;
    -- The turn row: whoever asked for a turn meanwhile has lifted the reservation, and then it stays due.
    IF v_holds AND v_wake IS NULL THEN
        DELETE FROM orchestrator.work
        WHERE run_id = p_run AND key = '' AND reserved_at IS NOT NULL
          AND incarnation = p_incarnation AND child = p_child;
    ELSIF v_wake IS NOT NULL THEN
        INSERT INTO orchestrator.work AS w (run_id, key, role, target, queue, priority, due_at)
        VALUES (p_run, '', 'turn', p_more ->> 'target', p_more ->> 'queue', (p_more ->> 'priority')::smallint, v_wake)
        ON CONFLICT (run_id, key) DO UPDATE SET
            target = CASE WHEN p_more -> 'continue' IS NULL THEN w.target ELSE EXCLUDED.target END,
            due_at = CASE WHEN v_holds AND w.reserved_at IS NOT NULL
                               AND w.incarnation = p_incarnation AND w.child = p_child
                          THEN EXCLUDED.due_at ELSE least(w.due_at, EXCLUDED.due_at) END,
            reserved_at = NULL, incarnation = NULL, child = NULL;
    END IF;
    IF v_posts <> '[]' THEN
        posted := posted || orchestrator.post_1(
            (SELECT jsonb_agg(p) FROM jsonb_array_elements(v_posts) AS p WHERE p ->> 'run' > p_run), p_now);
    END IF;
    IF p_more -> 'work' IS NOT NULL THEN
        INSERT INTO orchestrator.work (run_id, key, role, target, queue, task, priority, due_at, attempt, call, gate)
        SELECT p_run, w.key, w.role, w.target, w.queue, w.task, w.priority, coalesce(w.due, p_now), w.attempt, w.call,
            w.gate
        FROM json_to_recordset(p_more -> 'work') AS w (key text, role text, target text, queue text, task text,
            priority smallint, due timestamptz, attempt integer, call json, gate text);
    END IF;
    IF p_more -> 'consumed' IS NOT NULL THEN
        v_consumed := ARRAY(SELECT json_array_elements_text(p_more -> 'consumed')::bigint);
        DELETE FROM orchestrator.arrivals WHERE id = ANY (v_consumed);
    END IF;
    IF p_more -> 'continue' IS NOT NULL THEN
        PERFORM orchestrator.continue_1(p_run, p_more -> 'continue', p_now);
    END IF;
END $$;

CREATE FUNCTION orchestrator.commit_turn_1(
    p_run text, p_position integer, p_at timestamptz, p_entries json, p_state text, p_incarnation bigint,
    p_child integer, p_done_key text, p_done_fence bigint, p_shared boolean, p_next json, p_next_fence bigint,
    p_more json, p_now timestamptz,
    OUT written boolean, OUT owed boolean, OUT now timestamptz, OUT posted text[]
) LANGUAGE plpgsql AS $$
DECLARE
    v_next record;
    v_left integer := 0;
    v_seconds double precision;
BEGIN
    now := coalesce(p_now, orchestrator.now());
    written := false;
    owed := false;
    -- 1. The run's row, by its position.  With other work of the run about, others may be committing: do not wait.
    IF p_shared THEN
        PERFORM FROM orchestrator.runs WHERE id = p_run AND position = p_position FOR NO KEY UPDATE SKIP LOCKED;
        IF NOT FOUND THEN
            RETURN;
        END IF;
    END IF;
    -- Whatever was left for the run is read before it ends: a cancel that came in time is not passed over.
    IF (p_more ->> 'ended')::boolean AND EXISTS (
        SELECT FROM orchestrator.arrivals WHERE run_id = p_run
          AND NOT id::text = ANY (ARRAY(SELECT json_array_elements_text(coalesce(p_more -> 'consumed', '[]'))))
    ) THEN
        owed := true;
        RETURN;
    END IF;
    IF p_more IS NULL OR p_more -> 'summary' IS NULL THEN
        UPDATE orchestrator.runs SET position = p_position + 1, state = p_state
        WHERE id = p_run AND position = p_position;
    ELSE
        UPDATE orchestrator.runs SET position = p_position + 1, state = p_state,
            output = s.output, error = s.error, left_effects = s.left_effects, parked = s.parked,
            past_pivot = s.past_pivot, published = coalesce(s.published, runs.published),
            tags = jsonb_strip_nulls(runs.tags || coalesce(s.tags, '{}')),
            finished_at = CASE WHEN s.ended THEN commit_turn_1.now END
        FROM json_to_record(p_more -> 'summary') AS s (
            output jsonb, error jsonb, left_effects jsonb, parked jsonb, past_pivot boolean, published jsonb,
            tags jsonb, ended boolean)
        WHERE id = p_run AND position = p_position;
    END IF;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    -- 2. The attempt's row, by its fence (primary key of work).  It becomes the next begun step, if there is one.
    IF p_next IS NOT NULL THEN
        SELECT * INTO v_next FROM json_to_record(p_next) AS n (
            key text, role text, target text, queue text, task text, priority smallint, attempt integer, call json);
        v_seconds := (v_next.call ->> 't')::double precision;
    END IF;
    IF p_done_key IS NULL THEN
        IF p_next IS NOT NULL THEN
            INSERT INTO orchestrator.work (run_id, key, role, target, queue, task, priority, due_at, attempt, call,
                fence, reserved_at, incarnation, child, begun_at, deadline_at, expires_at)
            VALUES (p_run, v_next.key, v_next.role, v_next.target, v_next.queue, v_next.task, v_next.priority, now,
                v_next.attempt, v_next.call, p_next_fence, now, p_incarnation, p_child, now,
                now + make_interval(secs => v_seconds),
                now + make_interval(secs => least(v_seconds + 5, (v_next.call ->> 'h')::double precision)));
        END IF;
    ELSE
        IF p_next IS NULL THEN
            DELETE FROM orchestrator.work WHERE run_id = p_run AND key = p_done_key AND fence = p_done_fence;
        ELSE
            UPDATE orchestrator.work SET
                key = v_next.key, role = v_next.role, target = v_next.target, queue = v_next.queue, task = v_next.task,
                gate = NULL, priority = v_next.priority, due_at = commit_turn_1.now, attempt = v_next.attempt,
                call = v_next.call, fence = p_next_fence, reserved_at = commit_turn_1.now,
                incarnation = p_incarnation, child = p_child, begun_at = commit_turn_1.now,
                deadline_at = commit_turn_1.now + make_interval(secs => v_seconds),
                expires_at = commit_turn_1.now
                    + make_interval(secs => least(v_seconds + 5, (v_next.call ->> 'h')::double precision)),
                details = NULL, stop = false
            WHERE run_id = p_run AND key = p_done_key AND fence = p_done_fence;
        END IF;
        IF NOT FOUND THEN
            -- The fence is lost.  The position was moved above, so this takes it back with everything else.
            RAISE EXCEPTION 'fence lost' USING ERRCODE = 'OR001';
        END IF;
    END IF;
    -- 3. The journal.
    INSERT INTO orchestrator.journal (run_id, seq, at, entries) VALUES (p_run, p_position, p_at, p_entries);
    -- 4. What is rarer.
    IF p_more IS NOT NULL THEN
        SELECT m.left_here, m.posted INTO v_left, posted
        FROM orchestrator.commit_more_1(p_run, p_more, p_incarnation, p_child, now) AS m;
    END IF;
    written := true;
    owed := v_left > 0 OR EXISTS (SELECT FROM orchestrator.arrivals WHERE run_id = p_run);
END $$;

CREATE FUNCTION orchestrator.commit_turns_1(
    p_turns json, p_incarnation bigint, p_child integer, p_now timestamptz
) RETURNS TABLE (run_id text, owed boolean, now timestamptz) LANGUAGE plpgsql
-- Joins are of a few rows with their primary keys, whatever the planner thinks of the length of a JSON array.
SET enable_hashjoin = off SET enable_mergejoin = off AS $$
#variable_conflict use_column
DECLARE
    v_now constant timestamptz := coalesce(p_now, orchestrator.now());
    v_turn record;
BEGIN
    -- What commit_turn_1 does for one turn, for many at once: a statement's start-up is most of what a turn costs.
    FOR v_turn IN
        WITH turn AS MATERIALIZED (
            -- 1. The runs' rows, by their position, in the order of their ids; who is at work on one is not waited for.
            SELECT t.* FROM json_to_recordset(p_turns) AS t (
                run text, position integer, at timestamptz, state text, entries json, held json, work json,
                holds boolean, wake timestamptz, ended boolean, summary json, consumed bigint[])
            JOIN orchestrator.runs r ON r.id = t.run AND r.position = t.position
            -- Whatever was left for a run is read before it ends: a cancel that came in time is not passed over.
            WHERE t.ended IS NULL OR NOT EXISTS (
                SELECT FROM orchestrator.arrivals a
                WHERE a.run_id = t.run AND NOT a.id = ANY (coalesce(t.consumed, '{}')))
            ORDER BY r.id FOR NO KEY UPDATE OF r SKIP LOCKED
        ), moved AS (
            UPDATE orchestrator.runs r SET position = t.position + 1, state = t.state
            FROM turn t WHERE r.id = t.run AND t.summary IS NULL
        ), summed AS (
            UPDATE orchestrator.runs r SET position = t.position + 1, state = t.state,
                output = s.output, error = s.error, left_effects = s.left_effects, parked = s.parked,
                past_pivot = s.past_pivot, published = coalesce(s.published, r.published),
                tags = jsonb_strip_nulls(r.tags || coalesce(s.tags, '{}')),
                finished_at = CASE WHEN t.ended THEN v_now END
            FROM turn t CROSS JOIN LATERAL json_to_record(t.summary) AS s (
                output jsonb, error jsonb, left_effects jsonb, parked jsonb, past_pivot boolean, published jsonb,
                tags jsonb)
            WHERE r.id = t.run AND t.summary IS NOT NULL
        ), held AS MATERIALIZED (
            -- 2. What this child held: attempts by their fence, the turn row as long as its reservation stands.
            SELECT t.run, t.ended, t.wake, h.* FROM turn t
            CROSS JOIN LATERAL json_to_recordset(t.held) AS h (row_key text, done bigint, next json)
        ), begun AS MATERIALIZED (
            SELECT h.run, h.row_key, h.done, n.* FROM held h CROSS JOIN LATERAL json_to_record(h.next) AS n (
                key text, role text, target text, queue text, task text, priority smallint, attempt integer, call json,
                fence bigint)
            WHERE h.next IS NOT NULL
        ), changed AS (
            UPDATE orchestrator.work w SET
                key = n.key, role = n.role, target = n.target, queue = n.queue, task = n.task, priority = n.priority,
                gate = NULL, due_at = v_now, attempt = n.attempt, call = n.call, fence = n.fence, reserved_at = v_now,
                incarnation = p_incarnation, child = p_child, begun_at = v_now,
                deadline_at = v_now + make_interval(secs => (n.call ->> 't')::float8),
                expires_at = v_now + make_interval(
                    secs => least((n.call ->> 't')::float8 + 5, (n.call ->> 'h')::float8)),
                details = NULL, stop = false
            FROM begun n WHERE w.run_id = n.run AND w.key = n.row_key
              AND (w.fence = n.done OR n.done IS NULL AND w.fence IS NULL AND w.reserved_at IS NOT NULL
                   AND w.incarnation = p_incarnation AND w.child = p_child)
            RETURNING n.run, n.row_key
        ), slept AS (
            UPDATE orchestrator.work w SET due_at = h.wake, reserved_at = NULL, incarnation = NULL, child = NULL
            FROM held h WHERE h.wake IS NOT NULL AND w.run_id = h.run AND w.key = h.row_key AND h.row_key = ''
              AND w.reserved_at IS NOT NULL AND w.incarnation = p_incarnation AND w.child = p_child
        ), gone AS (
            DELETE FROM orchestrator.work w USING held h
            WHERE h.next IS NULL AND h.ended IS NULL AND (h.row_key <> '' OR h.wake IS NULL)
              AND w.run_id = h.run AND w.key = h.row_key
              AND (w.fence = h.done OR h.done IS NULL AND w.fence IS NULL AND w.reserved_at IS NOT NULL
                   AND w.incarnation = p_incarnation AND w.child = p_child)
            RETURNING h.run, h.row_key
        ), cleared AS (
            -- An end takes all work with it, but for a turn that somebody has asked for meanwhile.
            DELETE FROM orchestrator.work w USING turn t
            WHERE t.ended AND w.run_id = t.run AND (w.key <> '' OR t.holds IS NULL OR w.reserved_at IS NOT NULL
                  AND w.incarnation = p_incarnation AND w.child = p_child)
            RETURNING t.run, w.key AS row_key, w.fence
        ), added AS (
            INSERT INTO orchestrator.work (run_id, key, role, target, queue, task, priority, due_at, attempt, call,
                gate, fence, reserved_at, incarnation, child, begun_at, deadline_at, expires_at)
            SELECT a.run, a.key, a.role, a.target, a.queue, a.task, a.priority, coalesce(a.due, v_now), a.attempt,
                a.call, a.gate, a.fence, b.at, b.incarnation, b.child, b.at,
                b.at + make_interval(secs => (a.call ->> 't')::float8),
                b.at + make_interval(secs => least((a.call ->> 't')::float8 + 5, (a.call ->> 'h')::float8))
            FROM (
                SELECT t.run, w.* FROM turn t CROSS JOIN LATERAL json_to_recordset(t.work) AS w (
                    key text, role text, target text, queue text, task text, priority smallint, attempt integer,
                    call json, fence bigint, due timestamptz, gate text)
                UNION ALL
                SELECT n.run, n.key, n.role, n.target, n.queue, n.task, n.priority, n.attempt, n.call, n.fence, NULL,
                    NULL
                FROM begun n
                WHERE n.done IS NULL
                  AND NOT EXISTS (SELECT FROM changed c WHERE c.run = n.run AND c.row_key = n.row_key)
            ) AS a LEFT JOIN LATERAL (
                SELECT v_now AS at, p_incarnation AS incarnation, p_child AS child
            ) AS b ON a.fence IS NOT NULL
            WHERE (SELECT count(*) FROM gone) >= 0 -- the row of an attempt goes before that of the next one comes
        ), noted AS (
            -- 3. The journal, and what it has taken in.
            INSERT INTO orchestrator.journal (run_id, seq, at, entries)
            SELECT t.run, t.position, t.at, t.entries FROM turn t
        ), read AS (
            DELETE FROM orchestrator.arrivals a USING turn t WHERE a.id = ANY (t.consumed)
        )
        SELECT t.run,
            EXISTS (
                SELECT FROM orchestrator.arrivals a
                WHERE a.run_id = t.run AND NOT a.id = ANY (coalesce(t.consumed, '{}'))
            ) AS owed,
            EXISTS (
                SELECT FROM held h WHERE h.run = t.run AND h.done IS NOT NULL
                  AND NOT EXISTS (SELECT FROM changed c WHERE c.run = h.run AND c.row_key = h.row_key)
                  AND NOT EXISTS (SELECT FROM gone g WHERE g.run = h.run AND g.row_key = h.row_key)
                  AND NOT EXISTS (
                      SELECT FROM cleared e WHERE e.run = h.run AND e.row_key = h.row_key AND e.fence = h.done)
            ) AS lost
        FROM turn t
    LOOP
        IF v_turn.lost THEN
            -- A fence is lost: this takes back everything that was written above, of all of them.
            RAISE EXCEPTION 'fence lost' USING ERRCODE = 'OR001';
        END IF;
        RETURN QUERY SELECT v_turn.run, v_turn.owed, v_now;
    END LOOP;
END $$;

-- gates
CREATE FUNCTION orchestrator.admit_1(p_gate text, p_now timestamptz)
RETURNS TABLE (queue text, due_at timestamptz) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    v_now constant timestamptz := coalesce(p_now, orchestrator.now());
    v_line constant interval := interval '8766000 hours'; -- as store.gates.LINE
    v_ahead constant interval := interval '2 seconds'; -- twice the pause of the pump, which comes by again
    v_inside timestamptz := v_now + v_line / 2;
    v_next timestamptz;
    v_in integer;
    v_unserved text[];
    v_head record;
    v_slot timestamptz;
BEGIN
    INSERT INTO orchestrator.gates AS g (name) VALUES (p_gate)
    ON CONFLICT (name) DO UPDATE SET next_at = g.next_at RETURNING g.next_at INTO v_next; -- locked until the end
    -- Who is in, begun or not (index work_gate).  Where admitted steps lie, nobody takes them: no more of those.
    SELECT count(*), array_agg(DISTINCT w.queue) FILTER (WHERE w.fence IS NULL AND w.due_at < v_now - v_ahead / 2)
    INTO v_in, v_unserved FROM orchestrator.work w WHERE w.gate = p_gate AND w.due_at < v_inside;
    FOR v_n IN 1 .. 10000 LOOP
        -- Whoever is being withdrawn is passed over; nobody waits for a row of work here.
        SELECT w.run_id, w.key, w.queue, w.due_at - v_line AS wanted, (w.call -> 'g' ->> 'most')::integer AS most,
            (w.call -> 'g' ->> 'every')::float8 AS every
        INTO v_head FROM orchestrator.work w
        WHERE w.gate = p_gate AND w.due_at >= v_inside AND NOT w.queue = ANY (coalesce(v_unserved, '{}'))
        ORDER BY w.due_at LIMIT 1 FOR UPDATE SKIP LOCKED;
        EXIT WHEN NOT FOUND OR v_in >= v_head.most OR v_head.most IS NOT NULL AND v_head.wanted > v_now;
        v_slot := greatest(v_now, v_head.wanted, CASE WHEN v_head.every IS NOT NULL THEN v_next END);
        EXIT WHEN v_slot > v_now + v_ahead;
        UPDATE orchestrator.work w SET due_at = v_slot WHERE w.run_id = v_head.run_id AND w.key = v_head.key;
        v_next := CASE WHEN v_head.every IS NULL THEN v_next ELSE v_slot + make_interval(secs => v_head.every) END;
        v_in := v_in + 1;
        queue := v_head.queue;
        due_at := v_slot;
        RETURN NEXT;
    END LOOP;
    UPDATE orchestrator.gates g SET next_at = v_next WHERE g.name = p_gate AND g.next_at <> v_next;
END $$;
