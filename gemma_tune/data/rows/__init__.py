"""Makes turns of what stands in a row: columns, chats, tools, thoughts, ready-made templates."""
