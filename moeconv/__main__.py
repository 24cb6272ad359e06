"""`python -m moeconv`."""

from moeconv.cli import main

main()
