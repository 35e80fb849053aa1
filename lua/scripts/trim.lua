#!lua flags=allow-oom
-- Drops outbox entries that every center has stored (M2). Which those are is the caller's business; the newest
-- entry stays in any case, so that the outbox always shows where the ledger is.
--
-- KEYS  1 fence  2 seq  3 outbox
-- ARGV  1 fence of the caller  2 epoch of the caller
--       3 epoch and 4 sequence of the first entry to keep
-- Reply {'OK', entries dropped}
--       {'NO_FENCE'} | {'FOREIGN', fence} | {'STALE_EPOCH', epoch} | {'FUTURE_EPOCH', epoch}
--@include fence

local state_of = redis.call('MGET', KEYS[1], KEYS[2])
if state_of[1] ~= ARGV[1] then
  return refusal(state_of[1], ARGV[1])
end
local newest = tonumber(state_of[2])
if not newest then
  return damaged('the ledger has a fence but no sequence')
end
local epoch, sequence = ARGV[3], ARGV[4]
if tonumber(epoch) > tonumber(ARGV[2]) or (epoch == ARGV[2] and tonumber(sequence) > newest) then
  epoch, sequence = ARGV[2], state_of[2]
end
return {'OK', redis.call('XTRIM', KEYS[3], 'MINID', '~', epoch .. '-' .. sequence)}
