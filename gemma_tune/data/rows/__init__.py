"""What stands in a row, made into the turns of a conversation: columns, chats, tools, thoughts, ready-made templates."""
