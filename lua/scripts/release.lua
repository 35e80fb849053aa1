#!lua flags=allow-oom
-- Gives the quantity of cancelled and expired orders of one sale back, each once, and leaves a tombstone.
--
-- KEYS  1 fence  2 clock  3 seq  4 outbox  5 touched  6 sale  7 claims of the sale
-- ARGV  1 fence of the caller  2 sale id  3 epoch of the caller  4 channel for news
--       5 the order ids one behind the other: 4 bytes head, 5 bytes sequence, big endian
--       6 the same as 19 digits and a newline each  7… the uid of each order
-- Reply {'OK', codes}; codes: a letter for each order
--         R released   A released already   U no such claim: nothing changed
--       {'NO_FENCE'} | {'FOREIGN', fence} | {'STALE_EPOCH', epoch} | {'FUTURE_EPOCH', epoch}
--@include fence

local FIRST = 7 -- index of the first order's uid in ARGV
local ORDER_BYTES = 9
local LINE_BYTES = 20
local CLAIM_BYTES = 29

local state_of = redis.call('MGET', KEYS[1], KEYS[2], KEYS[3])
if state_of[1] ~= ARGV[1] then
  return refusal(state_of[1], ARGV[1])
end
local last = tonumber(state_of[3])
if not last then
  return damaged('the ledger has a fence but no sequence')
end
local sale = redis.call('HMGET', KEYS[6], 'remaining', 'claimed', 'released', 'revision', 'state')
for i = 1, sale[5] and 4 or 0 do
  if not tonumber(sale[i]) then
    return damaged('sale ' .. ARGV[2] .. ' lacks a number')
  end
end
local entries = #ARGV - FIRST + 1
local before = redis.call('HMGET', KEYS[7], unpack(ARGV, FIRST))

local sub = string.sub
local codes, writes, lines = {}, {}, {}
local latest = {}
local units = 0
for i = 1, entries do
  local uid = ARGV[FIRST + i - 1]
  local order_at = ORDER_BYTES * (i - 1) + 1
  local head = sub(ARGV[5], order_at, order_at + 3)
  local sequence = sub(ARGV[5], order_at + 4, order_at + 8)
  -- Without its sale a claim is of no use: it stays as it is.
  local claims = sale[5] and (latest[uid] or before[i])
  local code = 'U'
  if claims then
    for at = 1, #claims, CLAIM_BYTES do
      if sub(claims, at + 24, at + 28) == sequence and sub(claims, at + 16, at + 19) == head then
        if string.byte(claims, at + 23) == 0 then
          code = 'R'
          units = units + struct.unpack('>I3', claims, at + 20)
          claims = sub(claims, 1, at + 22) .. '\1' .. sub(claims, at + 24)
          latest[uid] = claims
          writes[#writes + 1] = uid
          writes[#writes + 1] = claims
          lines[#lines + 1] = sub(ARGV[6], LINE_BYTES * (i - 1) + 1, LINE_BYTES * i)
        else
          code = 'A'
        end
        break
      end
    end
  end
  codes[i] = code
end

if #writes > 0 then
  local now = ledger_time(state_of[2])
  local seq = last + 1
  local revision = sale[4] + 1
  -- These two first, in this order: a key of the wrong type stops the script before anything counts.
  redis.call('ZADD', KEYS[5], seq, ARGV[2])
  redis.call('XADD', KEYS[4], ARGV[3] .. '-' .. seq,
    'v', '1', 'k', 'released', 's', ARGV[2], 'a', now, 'o', table.concat(lines))
  redis.call('HSET', KEYS[7], unpack(writes))
  redis.call('HSET', KEYS[6], 'remaining', sale[1] + units, 'claimed', sale[2] - units,
    'released', sale[3] + units, 'revision', revision)
  redis.call('MSET', KEYS[2], now, KEYS[3], seq)
  redis.call('PUBLISH', ARGV[4], ARGV[3] .. ':' .. ARGV[2] .. ':' .. revision)
end
return {'OK', table.concat(codes)}
