#!lua flags=allow-oom
-- A small fenced write: the master's heartbeat, and what a shared WAIT stands behind (K2).
--
-- KEYS  1 fence  2 clock
-- ARGV  1 fence of the caller
-- Reply {'OK', now}
--       {'NO_FENCE'} | {'FOREIGN', fence} | {'STALE_EPOCH', epoch} | {'FUTURE_EPOCH', epoch}
--@include fence

local state_of = redis.call('MGET', KEYS[1], KEYS[2])
if state_of[1] ~= ARGV[1] then
  return refusal(state_of[1], ARGV[1])
end
local now = ledger_time(state_of[2])
redis.call('SET', KEYS[2], now)
return {'OK', now}
