"""What every part of batchq uses: logs, texts, traces, secrets, names of hosts."""
