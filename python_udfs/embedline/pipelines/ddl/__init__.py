"""The SQL text of a pipeline's generated tables, functions, triggers and views.

Users' expressions enter only the functions of content, filter, prefix and tenant and what reads through them; these belong
to the source's owner. The trigger functions and tables belong to Embedline and hold key columns only.

The triggers' conditions compare the input columns and never evaluate the expression as the writer. It could raise, or
call a function that the writer may not call. An application's write never fails because of Embedline. Only where an
input changed does `<pipeline>_changed` evaluate it, as the source's owner, and an error counts as a change.

Bodies are quoted as constants: between dollar signs, a column's name that holds the same tag would end them.

No function takes the source's row type as a parameter: PostgreSQL would then refuse ALTER TABLE ... ADD COLUMN ...
DEFAULT. So trigger functions name the columns in plain text, and the event trigger embedline_follow_source writes them
again when one is renamed.
"""
