"""The command line of simexplain: parse, call, write."""
