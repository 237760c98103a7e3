"""The reliability campaign: faults, random use and long runs, each of which must end right."""
