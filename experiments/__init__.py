"""One-off measurements that write the records under results/; not part of the wheel."""
