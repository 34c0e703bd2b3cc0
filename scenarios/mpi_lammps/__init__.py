"""Molecules that melt in LAMMPS, saved in the middle."""
