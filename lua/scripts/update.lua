#!lua flags=allow-oom
-- Changes a sale's description. What may change after the start is the caller's business.
--
-- KEYS  1 fence  2 clock  3 seq  4 outbox  5 touched  6 sale
-- ARGV  1 fence of the caller  2 sale id  3 epoch of the caller
--       4 the version that the change is based on  5 description (JSON)  6 terms (JSON)
--       7 start (ms, or '' to keep)  8 end (ms, or '' for open)  9 units per user
--       10 '1' if the change is allowed only before the start, else '0'
-- Reply {'OK', version} | {'VERSION', version} it has another version | {'NOT_FOUND'} | {'ENDED'} | {'STARTED'}
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
local known = redis.call('HMGET', KEYS[6], 'state', 'version', 'starts')
if not known[1] or known[1] == 'archived' then
  return {'NOT_FOUND'}
end
if not tonumber(known[2]) or not tonumber(known[3]) then
  return damaged('sale ' .. ARGV[2] .. ' has no version or start')
end
if known[2] ~= ARGV[4] then
  return {'VERSION', tonumber(known[2])}
end
if known[1] == 'ended' then
  return {'ENDED'}
end
local now = ledger_time(state_of[2])
if ARGV[10] == '1' and now >= tonumber(known[3]) then
  return {'STARTED'}
end

local seq = last + 1
local version = known[2] + 1
-- These two first, in this order: a key of the wrong type stops the script before anything counts.
redis.call('ZADD', KEYS[5], seq, ARGV[2])
redis.call('XADD', KEYS[4], ARGV[3] .. '-' .. seq,
  'v', '1', 'k', 'sale', 's', ARGV[2], 'a', now, 'o', ARGV[5])
redis.call('HSET', KEYS[6], 'def', ARGV[5], 'terms', ARGV[6],
  'starts', ARGV[7] == '' and known[3] or ARGV[7], 'ends', ARGV[8], 'limit', ARGV[9], 'version', version)
redis.call('MSET', KEYS[2], now, KEYS[3], seq)
return {'OK', version}
