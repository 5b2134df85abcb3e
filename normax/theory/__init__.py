"""Update rules with their theory: effective rates, equilibria, schedules."""
