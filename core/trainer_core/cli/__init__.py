"""The command ``trainer``. Each subcommand is imported only when it is called."""
