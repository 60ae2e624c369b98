"""fastdiff under the calling conventions of other libraries."""
