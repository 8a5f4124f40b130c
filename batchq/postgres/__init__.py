"""The database: connections and deadlines, every statement, migrations, a private server for trying out."""
