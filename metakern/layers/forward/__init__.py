"""Forward mode that agrees with reverse mode: dual numbers, and functions in forms that have one."""
