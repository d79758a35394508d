//! Front ends and servers that go and come again.
