"""Tools for plugin authors and tests: real clips, tiny models, the plugin contract."""
