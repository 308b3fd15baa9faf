CREATE FUNCTION orchestrator.take_2(
    p_queues text[], p_targets text[], p_short text[], p_incarnation bigint, p_child integer, p_fences bigint[],
    p_reservation interval, p_back interval, p_now timestamptz
) RETURNS TABLE (
    run_id text, key text, role text, target text, queue text, task text, attempt integer, call json, fence bigint,
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
    -- Index work_due, once per level of priority that can be there, so that what sleeps is never looked at; nor, with
    -- p_back, what was due longer ago, of which nothing was left: while somebody holds an old snapshot (a dump, a long
    -- report), entries of rows that are gone stay in the index.
    FOR v_level IN REVERSE CASE WHEN EXISTS (
        SELECT FROM orchestrator.work
        WHERE fence IS NULL AND queue = ANY (p_queues) AND priority > 0 AND due_at <= v_now
    ) THEN 9 ELSE 0 END .. 0 LOOP
        FOREACH v_queue IN ARRAY p_queues LOOP
            -- Rows that somebody else holds are skipped, rows that nobody here can do as well.  What is begun and not
            -- run burns an attempt if the process dies: a step begins alone, unless it is known to be short.  So does a
            -- turn whose last holder is gone without having committed it (primary key of drainers): the next ones may
            -- go the same way, and `attempt` counts them.  1 is a turn that was passed on.
            FOR run_id, key, role, target, queue, task, attempt, call, fence, deadline_at, now, saga, version,
                run_queue, input, started_at, run_deadline_at, priority, "position", state, parent, link, since
            IN
                WITH due AS MATERIALIZED (
                    SELECT d.run_id, d.key, d.due_at, d.role = 'turn' AS turn, d.task = ANY (p_short) AS short,
                        d.reserved_at IS NULL AS untried,
                        d.reserved_at IS NOT NULL AND NOT EXISTS (
                            SELECT FROM orchestrator.drainers m JOIN orchestrator.incarnations i ON i.id = m.incarnation
                            WHERE m.incarnation = d.incarnation AND m.child = d.child AND i.dead_at IS NULL) AS orphaned,
                        d.attempt
                    FROM orchestrator.work d
                    WHERE d.fence IS NULL AND d.queue = v_queue AND d.priority = v_level
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
                    FROM chosen c WHERE u.run_id = c.run_id AND u.key = c.key
                    RETURNING u.*, c.turn, c.n
                )
                SELECT t.run_id, t.key, t.role, t.target, t.queue, t.task, t.attempt, t.call, t.fence, t.deadline_at,
                    v_now, r.saga, r.version, r.queue, r.input, r.started_at, r.deadline_at, r.priority, r.position,
                    r.state, CASE WHEN r.root_id <> r.id THEN r.parent_id END, r.link, r.since
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
