"""Every statement of batchq, a function each, run inside the caller's transaction.

Each names its batches' queue by equality: so the claim's index gives the order without a sort, and the table could be
distributed by queue. A write for a claimed batch matches its id and its claim token (the fence): where it matches
nothing, the batch is no longer the caller's. DDL is in migrations/ only.

Times are the database's; durations are passed in seconds. JSON goes in and comes out as text.
"""
