#!lua flags=allow-oom
-- Adds stock to a sale or takes some away, once for each idempotency key, never below what is claimed.
--
-- KEYS  1 fence  2 clock  3 seq  4 outbox  5 touched  6 sale  7 stock changes of the sale
-- ARGV  1 fence of the caller  2 sale id  3 epoch of the caller  4 channel for news
--       5 digest of the idempotency key  6 the change in units (negative takes away)  7 the largest total
-- Reply {'OK', total, remaining, version} | {'REPLAY', total, remaining, version} as it was answered first
--       {'KEY_REUSED'} with another change | {'BELOW_CLAIMED', remaining} | {'TOO_LARGE'} | {'TOO_MANY'} changes
--       {'NOT_FOUND'} | {'ENDED'}
--       {'NO_FENCE'} | {'FOREIGN', fence} | {'STALE_EPOCH', epoch} | {'FUTURE_EPOCH', epoch}
--@include fence

local MAX_CHANGES = 100000

local state_of = redis.call('MGET', KEYS[1], KEYS[2], KEYS[3])
if state_of[1] ~= ARGV[1] then
  return refusal(state_of[1], ARGV[1])
end
local last = tonumber(state_of[3])
if not last then
  return damaged('the ledger has a fence but no sequence')
end
local known = redis.call('HMGET', KEYS[6], 'state', 'total', 'remaining', 'version', 'revision')
if not known[1] or known[1] == 'archived' then
  return {'NOT_FOUND'}
end
for i = 2, 5 do
  if not tonumber(known[i]) then
    return damaged('sale ' .. ARGV[2] .. ' lacks a number')
  end
end
local earlier = redis.call('HGET', KEYS[7], ARGV[5])
if earlier then
  local delta, total, remaining, version = string.match(earlier, '^(-?%d+) (%d+) (%d+) (%d+)$')
  if delta ~= ARGV[6] then
    return {'KEY_REUSED'}
  end
  return {'REPLAY', tonumber(total), tonumber(remaining), tonumber(version)}
end
if known[1] == 'ended' then
  return {'ENDED'}
end
local delta = tonumber(ARGV[6])
local total, remaining = known[2] + delta, known[3] + delta
if remaining < 0 then
  return {'BELOW_CLAIMED', tonumber(known[3])}
end
if total > tonumber(ARGV[7]) then
  return {'TOO_LARGE'}
end
if redis.call('HLEN', KEYS[7]) >= MAX_CHANGES then
  return {'TOO_MANY'}
end

local now = ledger_time(state_of[2])
local seq = last + 1
local version, revision = known[4] + 1, known[5] + 1
-- These two first, in this order: a key of the wrong type stops the script before anything counts.
redis.call('ZADD', KEYS[5], seq, ARGV[2])
redis.call('XADD', KEYS[4], ARGV[3] .. '-' .. seq,
  'v', '1', 'k', 'stock', 's', ARGV[2], 'a', now, 'o', ARGV[6])
redis.call('HSET', KEYS[6], 'total', total, 'remaining', remaining, 'version', version, 'revision', revision)
redis.call('HSET', KEYS[7], ARGV[5], string.format('%s %d %d %d', ARGV[6], total, remaining, version))
redis.call('MSET', KEYS[2], now, KEYS[3], seq)
redis.call('PUBLISH', ARGV[4], ARGV[3] .. ':' .. ARGV[2] .. ':' .. revision)
return {'OK', total, remaining, version}
