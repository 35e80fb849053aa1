#!lua flags=allow-oom
-- Pauses, resumes or ends a sale.
--
-- KEYS  1 fence  2 clock  3 seq  4 outbox  5 touched  6 sale
-- ARGV  1 fence of the caller  2 sale id  3 epoch of the caller  4 the new state: active | paused | ended
-- Reply {'OK', version} | {'SAME', version} it was in that state | {'NOT_FOUND'} | {'ENDED'} it is over for good
--       {'NO_FENCE'} | {'FOREIGN', fence} | {'STALE_EPOCH', epoch} | {'FUTURE_EPOCH', epoch}
--@include fence

local state_of = redis.call('MGET', KEYS[1], KEYS[2], KEYS[3])
if state_of[1] ~= ARGV[1] then
  return refusal(state_of[1], ARGV[1])
end
local last = tonumber(state_of[3])
if not last then
  return damaged('the ledger has a fence but no sequence')
end
local known = redis.call('HMGET', KEYS[6], 'state', 'version', 'starts', 'ends')
if not known[1] or known[1] == 'archived' then
  return {'NOT_FOUND'}
end
if not tonumber(known[2]) or not tonumber(known[3]) then
  return damaged('sale ' .. ARGV[2] .. ' has no version or start')
end
if known[1] == ARGV[4] then
  return {'SAME', tonumber(known[2])}
end
if known[1] == 'ended' then
  return {'ENDED'}
end

local now = ledger_time(state_of[2])
local seq = last + 1
local version = known[2] + 1
-- These two first, in this order: a key of the wrong type stops the script before anything counts.
redis.call('ZADD', KEYS[5], seq, ARGV[2])
redis.call('XADD', KEYS[4], ARGV[3] .. '-' .. seq,
  'v', '1', 'k', 'state', 's', ARGV[2], 'a', now, 'o', ARGV[4])
redis.call('HSET', KEYS[6], 'state', ARGV[4], 'version', version)
if ARGV[4] == 'ended' then
  -- A sale ended before its start is over, not "not started".
  local starts = math.min(tonumber(known[3]), now)
  local ends = math.min(tonumber(known[4]) or now, now)
  redis.call('HSET', KEYS[6], 'starts', starts, 'ends', ends)
end
redis.call('MSET', KEYS[2], now, KEYS[3], seq)
return {'OK', version}
