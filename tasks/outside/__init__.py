"""The outside world, as one small HTTP server: card provider, warehouse, identity check, bank, and mail.

It shares nothing with the application, no database and no process: what happened here stays happened, whatever
becomes of the step that asked for it. It keeps the contract that an effect must keep to be undoable:

    PUT    /{kind}/{key}    do it, once for each key   200 the answer, 409 undone before, 422 refused: nothing done
    DELETE /{kind}/{key}    undo it, once; with nothing there, remember to refuse it later
    GET    /{kind}/{key}    the probe: what became of this key
    GET    /{kind}          the back office: everything, for those who check
    GET    /feeds/{account}?cursor=&limit=    the bank's transactions, page by page

and it can be told to misbehave, also over HTTP:

    PUT    /faults/{name}   switch a fault on; see `tasks.outside.faults`
    DELETE /faults          switch all off

Steps speak to it through `tasks.outside.client` alone.
"""
