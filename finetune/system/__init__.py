"""The machine: doctor, probe, CPU facts."""
