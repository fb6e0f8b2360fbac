"""Settings: one flat namespace of keys; each key has exactly one owner, core or a plugin."""
