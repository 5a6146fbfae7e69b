"""What went wrong, in one line."""


class UserError(Exception):
    """Something that the user can mend; its text says what was got, what is needed, what to do."""
