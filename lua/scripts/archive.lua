#!lua flags=allow-oom
-- Drops the claims and tombstones of a sale that is over (M1). The caller has made sure that every entry is
-- stored, every order final and every release done; the script checks what the ledger itself can know.
--
-- KEYS  1 fence  2 clock  3 seq  4 outbox  5 touched  6 sale  7 claims  8 stock changes
-- ARGV  1 fence of the caller  2 sale id  3 epoch of the caller  4 retry window in ms
--       5 the sequence of the sale's last change that the caller has looked at
-- Reply {'OK', version} | {'SAME', version} archived before | {'NOT_FOUND'}
--       {'NOT_ENDED'} | {'RETRY_WINDOW', ms left} | {'CHANGED', sequence} something happened since the caller looked
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
local known = redis.call('HMGET', KEYS[6], 'state', 'version', 'ends')
if not known[1] then
  return {'NOT_FOUND'}
end
if known[1] == 'archived' then
  return {'SAME', tonumber(known[2])}
end
if not tonumber(known[2]) then
  return damaged('sale ' .. ARGV[2] .. ' has no version')
end
local now = ledger_time(state_of[2])
local ends = tonumber(known[3])
if not ends or now < ends then
  return {'NOT_ENDED'}
end
if now < ends + ARGV[4] then
  return {'RETRY_WINDOW', ends + ARGV[4] - now}
end
local touched = redis.call('ZSCORE', KEYS[5], ARGV[2])
if touched ~= ARGV[5] then
  return {'CHANGED', tonumber(touched) or 0}
end

local seq = last + 1
local version = known[2] + 1
-- These two first, in this order: a key of the wrong type stops the script before anything counts.
redis.call('ZADD', KEYS[5], seq, ARGV[2])
redis.call('XADD', KEYS[4], ARGV[3] .. '-' .. seq,
  'v', '1', 'k', 'state', 's', ARGV[2], 'a', now, 'o', 'archived')
redis.call('UNLINK', KEYS[7], KEYS[8])
redis.call('HSET', KEYS[6], 'state', 'archived', 'version', version)
redis.call('MSET', KEYS[2], now, KEYS[3], seq)
return {'OK', version}
