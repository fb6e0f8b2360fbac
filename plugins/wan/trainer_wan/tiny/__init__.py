"""A tiny Wan that has really learned: its world of moving shapes, its training, and how it is judged."""
