"""The database: connections and deadlines, every statement, migrations, a private server to try batchq with."""
