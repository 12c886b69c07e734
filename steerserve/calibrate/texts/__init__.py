"""The texts that attributes are found on: tasks, labelled texts, and noised copies of them."""
