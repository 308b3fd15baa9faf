-- Postgres reads the text of every CHECK again for each statement that writes the table.
ALTER TABLE orchestrator.runs DROP CONSTRAINT runs_state, DROP CONSTRAINT runs_priority_check;
ALTER TABLE orchestrator.work DROP CONSTRAINT work_role_check;

-- Who leaves a queue waits for starts that count on it; a start sees who drains without a commit in between.
CREATE FUNCTION orchestrator.leave_2(p_incarnation bigint, p_child integer) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    v_queue text;
BEGIN
    -- In the order of names.  A start takes such a lock last, and only if it need not wait.
    FOR v_queue IN
        SELECT unnest(queues) FROM orchestrator.drainers WHERE incarnation = p_incarnation AND child = p_child ORDER BY 1
    LOOP
        PERFORM pg_advisory_xact_lock(hashtextextended('orchestrator.drainers ' || v_queue, 0));
    END LOOP;
    DELETE FROM orchestrator.drainers WHERE incarnation = p_incarnation AND child = p_child;
END $$;

CREATE FUNCTION orchestrator.start_run_2(
    p_id text, p_saga text, p_version integer, p_input jsonb, p_queue text, p_priority smallint, p_delay float8,
    p_eta timestamptz, p_deadline float8, p_tags jsonb, p_now timestamptz, OUT started boolean, OUT rings integer
) LANGUAGE plpgsql AS $$
DECLARE
    v_now constant timestamptz := coalesce(p_now, orchestrator.now());
    v_start constant timestamptz := greatest(v_now + make_interval(secs => p_delay), p_eta);
BEGIN
    -- One row for the run and one for its first turn, or nothing at all if the id is taken (primary key of runs), or
    -- was taken by a run that is pruned (primary key of pruned).
    INSERT INTO orchestrator.runs (id, saga, version, input, queue, priority, root_id, tags, started_at, deadline_at)
    SELECT p_id, p_saga, p_version, p_input, p_queue, p_priority, p_id, coalesce(p_tags, '{}'), v_start,
        v_start + make_interval(secs => p_deadline)
    WHERE NOT EXISTS (SELECT FROM orchestrator.pruned p WHERE p.id = p_id)
    ON CONFLICT (id) DO NOTHING;
    started := FOUND;
    rings := 0;
    IF NOT started THEN
        RETURN;
    END IF;
    INSERT INTO orchestrator.work (run_id, key, role, target, queue, priority, due_at)
    VALUES (p_id, '', 'turn', p_saga || '@' || p_version, p_queue, p_priority, v_start);
    IF v_start > v_now THEN
        RETURN;
    END IF;
    -- Whoever drains from here on looks once more after this is committed.  Nothing below waits, for they may.
    IF pg_try_advisory_xact_lock_shared(hashtextextended('orchestrator.drainers ' || p_queue, 0)) THEN
        rings := orchestrator.rings_1(p_queue, 1);
    ELSE
        rings := 1;
    END IF;
END $$;

CREATE FUNCTION orchestrator.commit_turns_2(
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
    -- 1. The runs' rows, by their position, in the order of their ids; who is at work on one is not waited for.  Then the
    -- journal.
    WITH turn AS MATERIALIZED (
        SELECT t.* FROM json_to_recordset(p_turns) AS t (
            run text, position integer, at timestamptz, state text, entries json, summed boolean, ended boolean)
        JOIN orchestrator.runs r ON r.id = t.run AND r.position = t.position
        -- Whatever was left for a run is read before it ends: a cancel that came in time is not passed over.
        WHERE t.ended IS NULL OR NOT EXISTS (
            SELECT FROM orchestrator.arrivals a WHERE a.run_id = t.run AND NOT a.id = ANY (coalesce(p_consumed, '{}')))
        ORDER BY r.id FOR NO KEY UPDATE OF r SKIP LOCKED
    ), moved AS (
        UPDATE orchestrator.runs r SET position = t.position + 1, state = t.state
        FROM turn t WHERE r.id = t.run AND t.summed IS NULL
    ), noted AS (
        INSERT INTO orchestrator.journal (run_id, seq, at, entries)
        SELECT t.run, t.position, t.at, t.entries FROM turn t
    )
    SELECT array_agg(t.run) INTO v_runs FROM turn t;
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
    -- is begun next takes the row of something that was held; that of a turn which was asked for meanwhile stays.
    IF p_next IS NOT NULL THEN
        WITH next AS MATERIALIZED (
            SELECT * FROM json_to_recordset(p_next) AS n (
                run text, held text, done bigint, key text, role text, target text, queue text, task text,
                priority smallint, attempt integer, call json, seconds float8, silence float8, fence bigint)
            WHERE n.run = ANY (v_runs)
        ), changed AS (
            UPDATE orchestrator.work w SET
                key = n.key, role = n.role, target = n.target, queue = n.queue, task = n.task, priority = n.priority,
                gate = NULL, due_at = v_now, attempt = n.attempt, call = n.call, fence = n.fence, reserved_at = v_now,
                incarnation = p_incarnation, child = p_child, begun_at = v_now,
                deadline_at = v_now + make_interval(secs => n.seconds),
                expires_at = v_now + make_interval(secs => least(n.seconds + 5, n.silence)),
                details = NULL, stop = false
            FROM next n WHERE w.run_id = n.run AND w.key = n.held
              AND (w.fence = n.done OR n.done IS NULL AND w.fence IS NULL AND w.reserved_at IS NOT NULL
                   AND w.incarnation = p_incarnation AND w.child = p_child)
            RETURNING n.run
        )
        SELECT count(n.done) > 0, array_agg(n.run) INTO v_lost, v_others
        FROM next n WHERE NOT EXISTS (SELECT FROM changed c WHERE c.run = n.run);
    END IF;
    IF p_gone IS NOT NULL AND NOT v_lost THEN
        WITH held AS MATERIALIZED (
            SELECT * FROM json_to_recordset(p_gone) AS h (run text, held text, done bigint) WHERE h.run = ANY (v_runs)
        ), gone AS (
            DELETE FROM orchestrator.work w USING held h
            WHERE w.run_id = h.run AND w.key = h.held
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
                w.key <> ''
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
        WHERE s.run = ANY (v_runs) AND w.run_id = s.run AND w.key = '' AND w.reserved_at IS NOT NULL
          AND w.incarnation = p_incarnation AND w.child = p_child;
    END IF;
    -- After the row of an attempt is gone, that of the next one can come.
    IF p_added IS NOT NULL THEN
        INSERT INTO orchestrator.work (run_id, key, role, target, queue, task, priority, due_at, attempt, call, gate)
        SELECT a.run, a.key, a.role, a.target, a.queue, a.task, a.priority, coalesce(a.due, v_now), a.attempt, a.call,
            a.gate
        FROM json_to_recordset(p_added) AS a (
            run text, key text, role text, target text, queue text, task text, priority smallint, attempt integer,
            call json, due timestamptz, gate text)
        WHERE a.run = ANY (v_runs);
    END IF;
    IF v_others IS NOT NULL THEN
        INSERT INTO orchestrator.work (run_id, key, role, target, queue, task, priority, due_at, attempt, call, fence,
            reserved_at, incarnation, child, begun_at, deadline_at, expires_at)
        SELECT n.run, n.key, n.role, n.target, n.queue, n.task, n.priority, v_now, n.attempt, n.call, n.fence, v_now,
            p_incarnation, p_child, v_now, v_now + make_interval(secs => n.seconds),
            v_now + make_interval(secs => least(n.seconds + 5, n.silence))
        FROM json_to_recordset(p_next) AS n (
            run text, key text, role text, target text, queue text, task text, priority smallint, attempt integer,
            call json, seconds float8, silence float8, fence bigint)
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

-- An end looks again for what was left for its run, once nobody can leave anything more.
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
        DELETE FROM orchestrator.work WHERE run_id = p_run AND (key <> '' OR NOT v_holds);
        -- Who was just leaving an outcome held its row, and has been waited for: what came in belongs to the run.
        IF EXISTS (SELECT FROM orchestrator.arrivals WHERE run_id = p_run AND NOT id = ANY (v_consumed)) THEN
            RAISE EXCEPTION 'something has come in' USING ERRCODE = 'OR001';
        END IF;
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
        DELETE FROM orchestrator.arrivals WHERE id = ANY (v_consumed);
    END IF;
    IF p_more -> 'continue' IS NOT NULL THEN
        PERFORM orchestrator.continue_1(p_run, p_more -> 'continue', p_now);
    END IF;
END $$;
