#!lua flags=no-writes,allow-stale
-- Reads one sale.
--
-- KEYS  1 touched  2 sale
-- ARGV  1 sale id
-- Reply {sequence of its last change or false, {field, value, …}}

return {redis.call('ZSCORE', KEYS[1], ARGV[1]), redis.call('HGETALL', KEYS[2])}
