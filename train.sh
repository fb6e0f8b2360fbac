#!/bin/sh
exec trainer run "$@"
