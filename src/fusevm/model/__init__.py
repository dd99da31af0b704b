"""What things are: frozen records, enums, transition tables, the error tree. No I/O and no clock."""
