"""From a DataFrame to a table or a figure; nothing here measures."""
