"""Every statement of batchq, a function each, run inside the caller's transaction.

Each statement names its batches' queue by equality, so that the claim's index gives the order without a sort and the
table could be distributed by queue. A write for a claimed batch matches its id and its claim token (the fence). If it
matches nothing, the caller has lost the claim. DDL is in migrations/ only.

Times are the database's; durations are passed in seconds. JSON is sent and returned as text.
"""
