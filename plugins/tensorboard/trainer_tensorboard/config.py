"""The plugin has no keys of its own: ``report_to`` and ``tracker_run_name`` are core's."""

from __future__ import annotations

FLUSH_S = 10
"""Seconds after which events are on disk at the latest, so that a killed run loses few."""

PREVIEW_EDGE = 416
"""Longest edge of a video in TensorBoard, in pixels; the file in the run folder stays whole."""
