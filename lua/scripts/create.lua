#!lua
-- Puts a sale on offer.
--
-- KEYS  1 fence  2 clock  3 seq  4 outbox  5 touched  6 sale
-- ARGV  1 fence of the caller  2 sale id  3 epoch of the caller
--       4 digest of the body as the shop sent it  5 description (JSON)  6 terms (JSON, copied into records)
--       7 units  8 start (ms, or '' for now)  9 end (ms, or '' for open)  10 units per user
-- Reply {'OK', version} created | {'SAME', version} the same body was created before | {'EXISTS'}
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
local known = redis.call('HMGET', KEYS[6], 'state', 'digest', 'version')
if known[1] then
  if known[2] == ARGV[4] then
    return {'SAME', tonumber(known[3])}
  end
  return {'EXISTS'}
end

local now = ledger_time(state_of[2])
local seq = last + 1
-- These two first, in this order: a key of the wrong type stops the script before anything counts.
redis.call('ZADD', KEYS[5], seq, ARGV[2])
redis.call('XADD', KEYS[4], ARGV[3] .. '-' .. seq,
  'v', '1', 'k', 'sale', 's', ARGV[2], 'a', now, 'o', ARGV[5])
redis.call('HSET', KEYS[6],
  'state', 'active', 'digest', ARGV[4], 'def', ARGV[5], 'terms', ARGV[6],
  'total', ARGV[7], 'remaining', ARGV[7], 'claimed', 0, 'released', 0, 'accepted', 0,
  'starts', ARGV[8] == '' and now or ARGV[8], 'ends', ARGV[9], 'limit', ARGV[10],
  'version', 1, 'revision', 0, 'created', now)
redis.call('MSET', KEYS[2], now, KEYS[3], seq)
return {'OK', 1}
