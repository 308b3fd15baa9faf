-- A row of work is a lane of its run: 0 is that of the turn, each other one is driven by one child at a time.  When the
-- child goes on with the next step, only columns that no index has change: Postgres updates the row within its page
-- (HOT), and the log holds little more than what differs.  So the columns that differ from step to step come last.
-- Renamed before it is read, which locks it: a run that is started meanwhile waits, or its turn would be lost.
ALTER TABLE orchestrator.work RENAME TO work_before;
ALTER TABLE orchestrator.work_before DROP CONSTRAINT work_pkey;
DROP INDEX orchestrator.work_due, orchestrator.work_begun, orchestrator.work_gate;
CREATE TABLE orchestrator.work (
    run_id text NOT NULL,
    lane bigint NOT NULL DEFAULT 0,
    priority smallint NOT NULL DEFAULT 0,
    role text NOT NULL,
    queue text NOT NULL,
    due_at timestamptz NOT NULL,
    reserved_at timestamptz,
    gate text,
    incarnation bigint,
    child integer,
    begun_by bigint GENERATED ALWAYS AS (CASE WHEN fence IS NOT NULL THEN coalesce(incarnation, 0) END) STORED,
    target text NOT NULL,
    task text NOT NULL DEFAULT '',
    key text NOT NULL,
    call json,
    attempt integer NOT NULL DEFAULT 0,
    fence bigint,
    begun_at timestamptz,
    deadline_at timestamptz,
    expires_at timestamptz,
    details json,
    stop boolean NOT NULL DEFAULT false,
    PRIMARY KEY (run_id, lane)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000);
-- The runs of a page move in one wave: with room for twice as many rows nearly all of them stay in their page, and no
-- index gets a new entry.
ALTER TABLE orchestrator.runs SET (fillfactor = 50);
CREATE INDEX work_due ON orchestrator.work (queue, priority DESC, due_at) WHERE begun_by IS NULL;
CREATE INDEX work_begun ON orchestrator.work (begun_by) WHERE begun_by IS NOT NULL;
-- Who stands in line at a gate is due in a thousand years: it is out of the way there, and in order.
CREATE INDEX work_gate ON orchestrator.work (gate, due_at) WHERE gate IS NOT NULL;
INSERT INTO orchestrator.work (run_id, lane, priority, role, queue, due_at, reserved_at, gate, incarnation, child, target,
    task, key, call, attempt, fence, begun_at, deadline_at, expires_at, details, stop)
SELECT run_id, CASE key WHEN '' THEN 0 ELSE row_number() OVER (PARTITION BY run_id ORDER BY key) END, priority, role,
    queue, due_at, reserved_at, gate, incarnation, child, target, task, key, call, attempt, fence, begun_at, deadline_at,
    expires_at, details, stop
FROM orchestrator.work_before;
-- Whoever might read or write the table may do so still: workers need not be of the role that migrates.
DO $$
DECLARE
    v_grant record;
BEGIN
    FOR v_grant IN
        SELECT a.* FROM pg_class c CROSS JOIN LATERAL aclexplode(c.relacl) AS a
        WHERE c.oid = 'orchestrator.work_before'::regclass
    LOOP
        EXECUTE format('GRANT %s ON orchestrator.work TO %s %s', v_grant.privilege_type,
            CASE v_grant.grantee WHEN 0 THEN 'PUBLIC' ELSE v_grant.grantee::regrole::text END,
            CASE WHEN v_grant.is_grantable THEN 'WITH GRANT OPTION' ELSE '' END);
    END LOOP;
END $$;
DROP TABLE orchestrator.work_before;

-- Who puts a dump back makes the tables anew: the number of this one then differs from the one in its row.
ALTER TABLE orchestrator.lineage ADD COLUMN relation oid;
UPDATE orchestrator.lineage SET relation = 'orchestrator.lineage'::regclass;
ALTER TABLE orchestrator.lineage ALTER COLUMN relation SET NOT NULL;

DROP FUNCTION orchestrator.take_1, orchestrator.take_2, orchestrator.commit_turn_1, orchestrator.commit_turns_1,
    orchestrator.commit_turns_2;

CREATE OR REPLACE FUNCTION orchestrator.start_runs_1(p_runs json, p_now timestamptz)
RETURNS TABLE (run_id text, started_at timestamptz) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    v_now constant timestamptz := coalesce(p_now, orchestrator.now());
BEGIN
    -- A row for the run, one for its first turn and one for what it hears first; or nothing at all if the id is taken
    -- (primary key of runs), or was taken by a run that is pruned (primary key of pruned).
    RETURN QUERY
    WITH given AS MATERIALIZED (
        SELECT * FROM json_to_recordset(p_runs) AS r (
            id text, saga text, version integer, input jsonb, queue text, priority smallint, parent text,
            root text, tags jsonb, delay float8, eta timestamptz, deadline float8, hears json)
    ), run AS (
        INSERT INTO orchestrator.runs (
            id, saga, version, input, queue, priority, root_id, parent_id, tags, started_at, deadline_at)
        SELECT r.id, r.saga, r.version, r.input, r.queue, r.priority, coalesce(r.root, r.id), r.parent,
            coalesce(r.tags, '{}'), t.start, t.start + make_interval(secs => r.deadline)
        FROM given r
        CROSS JOIN LATERAL (SELECT greatest(v_now + make_interval(secs => r.delay), r.eta) AS start) AS t
        WHERE NOT EXISTS (SELECT FROM orchestrator.pruned p WHERE p.id = r.id)
        ORDER BY r.id
        ON CONFLICT (id) DO NOTHING RETURNING id, saga, version, queue, priority, started_at
    ), turn AS (
        -- Whose first turn is for anyone looks whether something was left for the run before it began.
        INSERT INTO orchestrator.work (run_id, key, role, target, queue, priority, due_at)
        SELECT id, '', 'turn', CASE WHEN given.hears IS NULL THEN run.saga || '@' || run.version ELSE '*' END, run.queue,
            run.priority, started_at
        FROM run JOIN given USING (id)
    ), heard AS (
        INSERT INTO orchestrator.arrivals (run_id, arrival)
        SELECT id, given.hears FROM run JOIN given USING (id) WHERE given.hears IS NOT NULL
    )
    SELECT id, started_at FROM run;
END $$;

CREATE FUNCTION orchestrator.take_3(
    p_queues text[], p_targets text[], p_short text[], p_incarnation bigint, p_child integer, p_fences bigint[],
    p_reservation interval, p_back interval, p_now timestamptz
) RETURNS TABLE (
    run_id text, lane bigint, key text, role text, target text, queue text, task text, attempt integer, call json, fence bigint,
    deadline_at timestamptz, now timestamptz, saga text, version integer, run_queue text, input jsonb,
    started_at timestamptz, run_deadline_at timestamptz, priority smallint, "position" integer, state text,
    parent text, link integer, since integer
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    v_now constant timestamptz := coalesce(p_now, orchestrator.now());
    v_since constant timestamptz := coalesce(v_now - p_back, '-infinity');
    v_limit constant integer := cardinality(p_fences);
    v_queue text;
    v_taken integer := 0;
    v_alone boolean := false;
BEGIN
    -- Whoever comes back after a lost connection waits for what was begun over it, see store.liveness.outlast.
    PERFORM pg_advisory_xact_lock_shared(hashint8extended(p_incarnation, p_child));
    -- Index work_due, once per level of priority that can be there, so that what sleeps is never looked at; nor, with
    -- p_back, what was due longer ago, of which nothing was left: while somebody holds an old snapshot (a dump, a long
    -- report), entries of rows that are gone stay in the index.
    FOR v_level IN REVERSE CASE WHEN EXISTS (
        SELECT FROM orchestrator.work
        WHERE begun_by IS NULL AND queue = ANY (p_queues) AND priority > 0 AND due_at <= v_now
    ) THEN 9 ELSE 0 END .. 0 LOOP
        FOREACH v_queue IN ARRAY p_queues LOOP
            -- Rows that somebody else holds are skipped, rows that nobody here can do as well.  What is begun and not
            -- run burns an attempt if the process dies: a step begins alone, unless it is known to be short and its last
            -- attempt was not lost (`w`), for it may be what ended the process.  So does a turn whose last holder is gone
            -- without having committed it (primary key of drainers): the next ones may go the same way, and `attempt`
            -- counts them.  1 is a turn that was passed on.
            FOR run_id, lane, key, role, target, queue, task, attempt, call, fence, deadline_at, now, saga, version,
                run_queue, input, started_at, run_deadline_at, priority, "position", state, parent, link, since
            IN
                WITH due AS MATERIALIZED (
                    SELECT d.run_id, d.lane, d.due_at, d.role = 'turn' AS turn,
                        d.task = ANY (p_short) AND (d.attempt = 0 OR d.call -> 'w' IS NULL) AS short,
                        d.reserved_at IS NULL AS untried,
                        d.reserved_at IS NOT NULL AND NOT EXISTS (
                            SELECT FROM orchestrator.drainers m JOIN orchestrator.incarnations i ON i.id = m.incarnation
                            WHERE m.incarnation = d.incarnation AND m.child = d.child AND i.dead_at IS NULL) AS orphaned,
                        d.attempt
                    FROM orchestrator.work d
                    WHERE d.begun_by IS NULL AND d.queue = v_queue AND d.priority = v_level
                      AND d.due_at BETWEEN v_since AND v_now
                      AND (d.reserved_at IS NULL OR d.reserved_at < v_now - p_reservation)
                      AND d.target = ANY (p_targets)
                    ORDER BY d.due_at LIMIT v_limit - v_taken FOR UPDATE SKIP LOCKED
                ), chosen AS MATERIALIZED (
                    SELECT c.* FROM (SELECT due.*, v_taken + row_number() OVER (ORDER BY due_at) AS n,
                        bool_and(CASE WHEN turn THEN untried OR NOT orphaned AND attempt < 2 ELSE short END)
                            OVER (ORDER BY due_at ROWS UNBOUNDED PRECEDING) AS short_so_far
                        FROM due) AS c
                    WHERE c.short_so_far OR c.n = 1
                ), taken AS (
                    UPDATE orchestrator.work u SET
                        reserved_at = v_now, incarnation = p_incarnation, child = p_child,
                        begun_at = CASE WHEN NOT c.turn THEN v_now END,
                        fence = CASE WHEN NOT c.turn THEN p_fences[c.n] END,
                        attempt = CASE WHEN c.turn AND c.untried THEN least(u.attempt, 1)
                            WHEN c.turn AND c.orphaned THEN greatest(u.attempt, 1) + 1
                            ELSE u.attempt + (NOT c.turn)::integer END,
                        deadline_at = CASE WHEN NOT c.turn
                            THEN v_now + make_interval(secs => (u.call ->> 't')::float8) END,
                        expires_at = CASE WHEN NOT c.turn THEN v_now + make_interval(
                            secs => least((u.call ->> 't')::float8 + 5, (u.call ->> 'h')::float8)) END
                    FROM chosen c WHERE u.run_id = c.run_id AND u.lane = c.lane
                    RETURNING u.*, c.turn, c.n
                )
                SELECT t.run_id, t.lane, t.key, t.role, t.target, t.queue, t.task, t.attempt, t.call, t.fence, t.deadline_at,
                    v_now, r.saga, r.version, r.queue, r.input, r.started_at, r.deadline_at, r.priority,
                    coalesce(r.position, (SELECT s.position FROM orchestrator.runs s WHERE s.id = t.run_id)), r.state, CASE WHEN r.root_id <> r.id THEN r.parent_id END, r.link, r.since
                FROM taken t LEFT JOIN orchestrator.runs r ON t.turn AND r.id = t.run_id ORDER BY t.n
            LOOP
                v_taken := v_taken + 1;
                v_alone := v_alone OR fence IS NOT NULL OR attempt > 1;
                RETURN NEXT;
            END LOOP;
            EXIT WHEN v_taken >= v_limit OR v_alone;
        END LOOP;
        EXIT WHEN v_taken >= v_limit OR v_alone;
    END LOOP;
    -- A reservation that a crash of the server forgets is only taken again; one that counts is kept.
    IF NOT v_alone THEN
        PERFORM set_config('synchronous_commit', 'off', true);
    END IF;
END $$;

CREATE OR REPLACE FUNCTION orchestrator.post_1(p_posts jsonb, p_now timestamptz) RETURNS text[] LANGUAGE plpgsql AS $$
DECLARE
    v_post record;
    v_queue text;
    v_queues text[] := '{}';
BEGIN
    -- An arrival for each of these runs, and its turn due; in the order of their ids, and for each run in the order in
    -- which they were given.  Returns the queues to ring.
    FOR v_post IN
        SELECT r.id, r.queue, r.priority, p.arrival,
            CASE WHEN p.anyone OR r.state = 'compensating' OR r.finished_at IS NOT NULL THEN '*'
                 ELSE r.saga || '@' || r.version END AS target
        FROM ROWS FROM (jsonb_to_recordset(p_posts) AS (run text, arrival jsonb, anyone boolean))
            WITH ORDINALITY AS p (run, arrival, anyone, n)
        JOIN orchestrator.runs r ON r.id = p.run ORDER BY r.id, p.n
    LOOP
        INSERT INTO orchestrator.arrivals (run_id, arrival) VALUES (v_post.id, v_post.arrival);
        INSERT INTO orchestrator.work AS w (run_id, key, role, target, queue, priority, due_at)
        VALUES (v_post.id, '', 'turn', v_post.target, v_post.queue, v_post.priority, p_now)
        ON CONFLICT (run_id, lane) DO UPDATE SET
            target = CASE WHEN EXCLUDED.target = '*' THEN EXCLUDED.target ELSE w.target END,
            due_at = least(w.due_at, EXCLUDED.due_at), reserved_at = NULL, incarnation = NULL, child = NULL
        RETURNING queue INTO v_queue;
        v_queues := v_queues || v_queue;
    END LOOP;
    RETURN v_queues;
END $$;

CREATE OR REPLACE FUNCTION orchestrator.commit_more_1(
    p_run text, p_more json, p_incarnation bigint, p_child integer, p_now timestamptz,
    OUT left_here integer, OUT posted text[]
) LANGUAGE plpgsql AS $$
DECLARE
    v_holds constant boolean := coalesce((p_more ->> 'holds')::boolean, false);
    v_wake constant timestamptz := (p_more ->> 'wake')::timestamptz;
    v_posts jsonb := coalesce(p_more -> 'posts', '[]');
    v_consumed constant bigint[] := ARRAY(
        SELECT json_array_elements_text(coalesce(p_more -> 'consumed', '[]'))::bigint);
    v_withdraw text[];
    v_count integer;
BEGIN
    left_here := 0;
    posted := '{}';
    IF p_more -> 'locks' IS NOT NULL OR p_more -> 'unlocks' IS NOT NULL THEN
        -- Before any row of work: who has the lock of a name gives turns to other runs.
        v_posts := v_posts || orchestrator.locks_1(p_run, p_more -> 'locks', p_more -> 'unlocks', p_now);
    END IF;
    IF (p_more ->> 'ended')::boolean THEN
        DELETE FROM orchestrator.work WHERE run_id = p_run AND (lane <> 0 OR NOT v_holds);
        -- Who was just leaving an outcome held its row, and has been waited for: what came in belongs to the run.
        IF EXISTS (SELECT FROM orchestrator.arrivals WHERE run_id = p_run AND NOT id = ANY (v_consumed)) THEN
            RAISE EXCEPTION 'something has come in' USING ERRCODE = 'OR001';
        END IF;
    END IF;
    IF p_more -> 'withdraw' IS NOT NULL THEN
        v_withdraw := ARRAY(SELECT json_array_elements_text(p_more -> 'withdraw'));
        -- Only what no committed begin names may be withdrawn; whoever began it is told to stop.  Who is just giving it
        -- back is waited for: it would be neither.
        PERFORM FROM orchestrator.work WHERE run_id = p_run AND key = ANY (v_withdraw) ORDER BY lane FOR UPDATE;
        WITH gone AS (
            DELETE FROM orchestrator.work WHERE run_id = p_run AND key = ANY (v_withdraw) AND fence IS NULL
            RETURNING key
        )
        INSERT INTO orchestrator.arrivals (run_id, arrival)
        SELECT p_run, json_build_object('e', 'withdrawn', 'key', key) FROM gone;
        GET DIAGNOSTICS left_here = ROW_COUNT;
        UPDATE orchestrator.work SET stop = true WHERE run_id = p_run AND key = ANY (v_withdraw);
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
        WHERE run_id = p_run AND lane = 0 AND reserved_at IS NOT NULL
          AND incarnation = p_incarnation AND child = p_child;
    ELSIF v_wake IS NOT NULL THEN
        INSERT INTO orchestrator.work AS w (run_id, key, role, target, queue, priority, due_at)
        VALUES (p_run, '', 'turn', p_more ->> 'target', p_more ->> 'queue', (p_more ->> 'priority')::smallint, v_wake)
        ON CONFLICT (run_id, lane) DO UPDATE SET
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
        INSERT INTO orchestrator.work (
            run_id, lane, key, role, target, queue, task, priority, due_at, attempt, call, gate)
        SELECT p_run, w.lane, w.key, w.role, w.target, w.queue, w.task, w.priority, coalesce(w.due, p_now), w.attempt, w.call,
            w.gate
        FROM json_to_recordset(p_more -> 'work') AS w (lane bigint, key text, role text, target text, queue text, task text,
            priority smallint, due timestamptz, attempt integer, call json, gate text);
    END IF;
    IF p_more -> 'consumed' IS NOT NULL THEN
        DELETE FROM orchestrator.arrivals WHERE id = ANY (v_consumed);
    END IF;
    IF p_more -> 'continue' IS NOT NULL THEN
        PERFORM orchestrator.continue_1(p_run, p_more -> 'continue', p_now);
    END IF;
END $$;

CREATE FUNCTION orchestrator.commit_turn_2(
    p_run text, p_position integer, p_at timestamptz, p_entries json, p_state text, p_incarnation bigint,
    p_child integer, p_done_lane bigint, p_done_fence bigint, p_shared boolean, p_next json, p_next_fence bigint,
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
    IF p_next IS NOT NULL AND p_done_lane IS NULL THEN
        -- No row of an attempt tells whoever comes back after a lost connection what was begun, see take_3.
        PERFORM pg_advisory_xact_lock_shared(hashint8extended(p_incarnation, p_child));
    END IF;
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
            finished_at = CASE WHEN s.ended THEN commit_turn_2.now END
        FROM json_to_record(p_more -> 'summary') AS s (
            output jsonb, error jsonb, left_effects jsonb, parked jsonb, past_pivot boolean, published jsonb,
            tags jsonb, ended boolean)
        WHERE id = p_run AND position = p_position;
    END IF;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    -- 2. The attempt's row, by its fence (primary key of work).  Its lane goes on with the next step, if there is one.
    IF p_next IS NOT NULL THEN
        SELECT * INTO v_next FROM json_to_record(p_next) AS n (
            lane bigint, key text, role text, target text, queue text, task text, priority smallint, attempt integer,
            call json);
        v_seconds := (v_next.call ->> 't')::double precision;
    END IF;
    IF p_done_lane IS NULL THEN
        IF p_next IS NOT NULL THEN
            INSERT INTO orchestrator.work (run_id, lane, key, role, target, queue, task, priority, due_at, attempt,
                call, fence, reserved_at, incarnation, child, begun_at, deadline_at, expires_at)
            VALUES (p_run, v_next.lane, v_next.key, v_next.role, v_next.target, v_next.queue, v_next.task, v_next.priority, now,
                v_next.attempt, v_next.call, p_next_fence, now, p_incarnation, p_child, now,
                now + make_interval(secs => v_seconds),
                now + make_interval(secs => least(v_seconds + 5, (v_next.call ->> 'h')::double precision)));
        END IF;
    ELSE
        IF p_next IS NULL THEN
            DELETE FROM orchestrator.work WHERE run_id = p_run AND lane = p_done_lane AND fence = p_done_fence;
        ELSE
            UPDATE orchestrator.work SET
                key = v_next.key, role = v_next.role, target = v_next.target, queue = v_next.queue, task = v_next.task,
                gate = NULL, priority = v_next.priority, attempt = v_next.attempt, call = v_next.call,
                fence = p_next_fence, incarnation = p_incarnation, child = p_child, begun_at = commit_turn_2.now,
                deadline_at = commit_turn_2.now + make_interval(secs => v_seconds),
                expires_at = commit_turn_2.now
                    + make_interval(secs => least(v_seconds + 5, (v_next.call ->> 'h')::double precision)),
                details = NULL, stop = false
            WHERE run_id = p_run AND lane = p_done_lane AND fence = p_done_fence;
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

CREATE FUNCTION orchestrator.commit_turns_3(
    p_turns json, p_summaries json, p_next json, p_gone json, p_sleeping json, p_ended json, p_added json,
    p_consumed bigint[], p_incarnation bigint, p_child integer, p_now timestamptz
) RETURNS TABLE (run_id text, owed boolean, now timestamptz) LANGUAGE plpgsql
-- Joins are of a few rows with their primary keys, whatever the planner thinks of the length of a JSON array.
SET enable_hashjoin = off SET enable_mergejoin = off AS $$
#variable_conflict use_column
DECLARE
    v_now constant timestamptz := coalesce(p_now, orchestrator.now());
    v_runs text[]; -- those whose turns are written
    v_lost boolean := false;
    v_others text[]; -- those whose next step takes nobody's row
BEGIN
    -- What commit_turn_1 does for one turn, for many at once: a statement's start-up is most of what a turn costs.  What
    -- none of the turns needs is NULL, and not set up.
    IF p_next IS NOT NULL THEN
        PERFORM pg_advisory_xact_lock_shared(hashint8extended(p_incarnation, p_child)); -- see take_3
    END IF;
    -- 1. The runs' rows, by their position, in the order of their ids, and the journal.  One that somebody has locked, or
    -- is changing (xmax), is locked first, so that nobody is waited for; so is one that the next statement changes.
    -- Elsewhere a lock would only make the log longer.
    WITH turn AS MATERIALIZED (
        SELECT * FROM json_to_recordset(p_turns) AS t (
            run text, position integer, at timestamptz, state text, entries json, summed boolean, ended boolean)
    ), held AS MATERIALIZED (
        SELECT t.run, t.summed FROM turn t JOIN orchestrator.runs r ON r.id = t.run AND r.position = t.position
        WHERE (t.summed OR r.xmax <> '0')
          -- Whatever was left for a run is read before it ends: a cancel that came in time is not passed over.
          AND (t.ended IS NULL OR NOT EXISTS (
              SELECT FROM orchestrator.arrivals a WHERE a.run_id = t.run AND NOT a.id = ANY (coalesce(p_consumed, '{}'))))
        ORDER BY r.id FOR NO KEY UPDATE OF r SKIP LOCKED
    ), moved AS (
        UPDATE orchestrator.runs r SET position = t.position + 1, state = t.state
        FROM turn t WHERE r.id = t.run AND r.position = t.position AND t.summed IS NULL
          AND (r.xmax = '0' OR EXISTS (SELECT FROM held h WHERE h.run = t.run))
        RETURNING r.id AS run
    ), written AS MATERIALIZED (
        SELECT run FROM moved UNION ALL SELECT run FROM held WHERE summed
    ), noted AS (
        INSERT INTO orchestrator.journal (run_id, seq, at, entries)
        SELECT t.run, t.position, t.at, t.entries FROM turn t WHERE t.run IN (SELECT run FROM written)
    )
    SELECT array_agg(run) INTO v_runs FROM written;
    IF v_runs IS NULL THEN
        RETURN;
    END IF;
    IF p_summaries IS NOT NULL THEN
        UPDATE orchestrator.runs r SET position = s.position + 1, state = s.state,
            output = s.output, error = s.error, left_effects = s.left_effects, parked = s.parked,
            past_pivot = s.past_pivot, published = coalesce(s.published, r.published),
            tags = jsonb_strip_nulls(r.tags || coalesce(s.tags, '{}')),
            finished_at = CASE WHEN s.ended THEN v_now END
        FROM json_to_recordset(p_summaries) AS s (
            run text, position integer, state text, ended boolean, output jsonb, error jsonb, left_effects jsonb,
            parked jsonb, past_pivot boolean, published jsonb, tags jsonb)
        WHERE s.run = ANY (v_runs) AND r.id = s.run;
    END IF;
    -- 2. What this child held: attempts by their fence, the turn row (no fence) as long as its reservation stands.  What
    -- is begun next takes the row of something that was held: no index sees the change where a lane goes on (HOT).  The
    -- row of a turn which was asked for meanwhile stays.
    IF p_next IS NOT NULL THEN
        WITH next AS MATERIALIZED (
            SELECT * FROM json_to_recordset(p_next) AS n (
                run text, held bigint, done bigint, lane bigint, key text, role text, target text, queue text, task text,
                priority smallint, attempt integer, call json, seconds float8, silence float8, fence bigint)
            WHERE n.run = ANY (v_runs)
        ), changed AS (
            UPDATE orchestrator.work w SET
                lane = n.lane, key = n.key, role = n.role, target = n.target, queue = n.queue, task = n.task,
                priority = n.priority, gate = NULL, attempt = n.attempt, call = n.call, fence = n.fence,
                incarnation = p_incarnation, child = p_child, begun_at = v_now,
                deadline_at = v_now + make_interval(secs => n.seconds),
                expires_at = v_now + make_interval(secs => least(n.seconds + 5, n.silence)),
                details = NULL, stop = false
            FROM next n WHERE w.run_id = n.run AND w.lane = n.held
              AND (w.fence = n.done OR n.done IS NULL AND w.fence IS NULL AND w.reserved_at IS NOT NULL
                   AND w.incarnation = p_incarnation AND w.child = p_child)
            RETURNING n.run
        )
        SELECT count(n.done) > 0, array_agg(n.run) INTO v_lost, v_others
        FROM next n WHERE NOT EXISTS (SELECT FROM changed c WHERE c.run = n.run);
    END IF;
    IF p_gone IS NOT NULL AND NOT v_lost THEN
        WITH held AS MATERIALIZED (
            SELECT * FROM json_to_recordset(p_gone) AS h (run text, held bigint, done bigint) WHERE h.run = ANY (v_runs)
        ), gone AS (
            DELETE FROM orchestrator.work w USING held h
            WHERE w.run_id = h.run AND w.lane = h.held
              AND (w.fence = h.done OR h.done IS NULL AND w.fence IS NULL AND w.reserved_at IS NOT NULL
                   AND w.incarnation = p_incarnation AND w.child = p_child)
            RETURNING h.done
        )
        SELECT count(*) > 0 INTO v_lost FROM held h
        WHERE h.done IS NOT NULL AND NOT EXISTS (SELECT FROM gone g WHERE g.done = h.done);
    END IF;
    IF p_ended IS NOT NULL AND NOT v_lost THEN
        -- An end takes all work with it, but for a turn that somebody has asked for since.
        WITH ended AS MATERIALIZED (
            SELECT * FROM json_to_recordset(p_ended) AS e (run text, holds boolean, done bigint[])
            WHERE e.run = ANY (v_runs)
        ), cleared AS (
            DELETE FROM orchestrator.work w USING ended e
            WHERE w.run_id = e.run AND (
                w.lane <> 0
                OR e.holds AND w.reserved_at IS NOT NULL AND w.incarnation = p_incarnation AND w.child = p_child
                OR e.holds IS NULL AND NOT EXISTS (
                    SELECT FROM orchestrator.arrivals a
                    WHERE a.run_id = e.run AND NOT a.id = ANY (coalesce(p_consumed, '{}'))))
            RETURNING w.fence
        )
        SELECT count(*) > 0 INTO v_lost FROM ended e CROSS JOIN LATERAL unnest(e.done) AS d (done)
        WHERE NOT EXISTS (SELECT FROM cleared c WHERE c.fence = d.done);
        -- Who was just leaving an outcome held its row, and has been waited for: what came in belongs to the run.
        v_lost := v_lost OR EXISTS (
            SELECT FROM json_to_recordset(p_ended) AS e (run text) JOIN orchestrator.arrivals a ON a.run_id = e.run
            WHERE e.run = ANY (v_runs) AND NOT a.id = ANY (coalesce(p_consumed, '{}')));
    END IF;
    IF v_lost THEN
        -- A fence is lost, or an end has come too soon: this takes back everything that was written above, of all.
        RAISE EXCEPTION 'fence lost' USING ERRCODE = 'OR001';
    END IF;
    IF p_sleeping IS NOT NULL THEN
        UPDATE orchestrator.work w SET due_at = s.wake, reserved_at = NULL, incarnation = NULL, child = NULL
        FROM json_to_recordset(p_sleeping) AS s (run text, wake timestamptz)
        WHERE s.run = ANY (v_runs) AND w.run_id = s.run AND w.lane = 0 AND w.reserved_at IS NOT NULL
          AND w.incarnation = p_incarnation AND w.child = p_child;
    END IF;
    IF p_added IS NOT NULL THEN
        INSERT INTO orchestrator.work (
            run_id, lane, key, role, target, queue, task, priority, due_at, attempt, call, gate)
        SELECT a.run, a.lane, a.key, a.role, a.target, a.queue, a.task, a.priority, coalesce(a.due, v_now), a.attempt, a.call,
            a.gate
        FROM json_to_recordset(p_added) AS a (
            run text, lane bigint, key text, role text, target text, queue text, task text, priority smallint,
            attempt integer, call json, due timestamptz, gate text)
        WHERE a.run = ANY (v_runs);
    END IF;
    IF v_others IS NOT NULL THEN
        INSERT INTO orchestrator.work (run_id, lane, key, role, target, queue, task, priority, due_at, attempt, call,
            fence, reserved_at, incarnation, child, begun_at, deadline_at, expires_at)
        SELECT n.run, n.lane, n.key, n.role, n.target, n.queue, n.task, n.priority, v_now, n.attempt, n.call, n.fence, v_now,
            p_incarnation, p_child, v_now, v_now + make_interval(secs => n.seconds),
            v_now + make_interval(secs => least(n.seconds + 5, n.silence))
        FROM json_to_recordset(p_next) AS n (
            run text, lane bigint, key text, role text, target text, queue text, task text, priority smallint,
            attempt integer, call json, seconds float8, silence float8, fence bigint)
        WHERE n.run = ANY (v_others);
    END IF;
    -- 3. What was taken in, and what has come since (index arrivals_by_run).
    IF p_consumed IS NOT NULL THEN
        DELETE FROM orchestrator.arrivals a WHERE a.id = ANY (p_consumed) AND a.run_id = ANY (v_runs);
    END IF;
    RETURN QUERY
        SELECT t.run, EXISTS (SELECT FROM orchestrator.arrivals a WHERE a.run_id = t.run), v_now
        FROM unnest(v_runs) AS t (run);
END $$;

CREATE OR REPLACE FUNCTION orchestrator.admit_1(p_gate text, p_now timestamptz)
RETURNS TABLE (queue text, due_at timestamptz) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    v_now constant timestamptz := coalesce(p_now, orchestrator.now());
    v_line constant interval := interval '8766000 hours'; -- as store.gates.LINE
    v_ahead constant interval := interval '2 seconds'; -- twice the pause of the pump, which comes by again
    v_inside timestamptz := v_now + v_line / 2;
    v_next timestamptz;
    v_in integer;
    v_paused constant text[] := ARRAY(SELECT p.name FROM orchestrator.pauses p WHERE p.kind = 'queue');
    v_served constant text[] := ARRAY(
        SELECT DISTINCT unnest(i.queues) FROM orchestrator.incarnations i WHERE i.dead_at IS NULL);
    v_others boolean := false;
    v_unserved text[];
    v_head record;
    v_slot timestamptz;
BEGIN
    INSERT INTO orchestrator.gates AS g (name) VALUES (p_gate)
    ON CONFLICT (name) DO UPDATE SET next_at = g.next_at RETURNING g.next_at INTO v_next; -- locked until the end
    IF v_paused <> '{}' THEN
        -- Nobody takes these until a person says so: they make room for others, and stand in line again.
        UPDATE orchestrator.work u SET due_at = u.due_at + v_line
        FROM (SELECT w.run_id, w.lane FROM orchestrator.work w
              WHERE w.gate = p_gate AND w.due_at < v_inside AND w.begun_by IS NULL AND w.queue = ANY (v_paused)
              FOR UPDATE SKIP LOCKED) AS w
        WHERE u.run_id = w.run_id AND u.lane = w.lane;
    END IF;
    -- So do those of a queue that no living worker has, if somebody waits whom one could take; a rate they do not hold.
    UPDATE orchestrator.work u SET due_at = u.due_at + v_line
    FROM (SELECT w.run_id, w.lane FROM orchestrator.work w
          WHERE w.gate = p_gate AND w.due_at < v_inside AND w.begun_by IS NULL AND NOT w.queue = ANY (v_served)
            AND w.call -> 'g' ->> 'most' IS NOT NULL
            AND EXISTS (SELECT FROM orchestrator.work o
                        WHERE o.gate = p_gate AND o.due_at >= v_inside AND o.queue = ANY (v_served)
                          AND NOT o.queue = ANY (v_paused))
          FOR UPDATE SKIP LOCKED) AS w
    WHERE u.run_id = w.run_id AND u.lane = w.lane;
    -- Who is in, begun or not (index work_gate).  Where admitted steps lie, nobody takes them: no more of those.
    SELECT count(*), v_paused || array_agg(DISTINCT w.queue) FILTER (WHERE w.fence IS NULL AND w.due_at < v_now - v_ahead / 2)
    INTO v_in, v_unserved FROM orchestrator.work w WHERE w.gate = p_gate AND w.due_at < v_inside;
    FOR v_n IN 1 .. 10000 LOOP
        -- Whoever is being withdrawn is passed over; nobody waits for a row of work here.  Others than those whom a
        -- living worker can take have what room these leave.
        SELECT w.run_id, w.lane, w.queue, w.due_at - v_line AS wanted, (w.call -> 'g' ->> 'most')::integer AS most,
            (w.call -> 'g' ->> 'every')::float8 AS every
        INTO v_head FROM orchestrator.work w
        WHERE w.gate = p_gate AND w.due_at >= v_inside AND NOT w.queue = ANY (v_unserved)
            AND (v_others OR w.queue = ANY (v_served))
        ORDER BY w.due_at LIMIT 1 FOR UPDATE SKIP LOCKED;
        IF NOT FOUND AND NOT v_others THEN
            v_others := true;
            CONTINUE;
        END IF;
        EXIT WHEN NOT FOUND OR v_in >= v_head.most OR v_head.most IS NOT NULL AND v_head.wanted > v_now;
        v_slot := greatest(v_now, v_head.wanted, CASE WHEN v_head.every IS NOT NULL THEN v_next END);
        EXIT WHEN v_slot > v_now + v_ahead;
        UPDATE orchestrator.work w SET due_at = v_slot WHERE w.run_id = v_head.run_id AND w.lane = v_head.lane;
        v_next := CASE WHEN v_head.every IS NULL THEN v_next ELSE v_slot + make_interval(secs => v_head.every) END;
        v_in := v_in + 1;
        queue := v_head.queue;
        due_at := v_slot;
        RETURN NEXT;
    END LOOP;
    UPDATE orchestrator.gates g SET next_at = v_next WHERE g.name = p_gate AND g.next_at <> v_next;
END $$;
