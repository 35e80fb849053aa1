#!lua flags=allow-oom
-- After a ledger was adopted that does not know them, or a shift lost them: claims the units of stored orders of one
-- sale again where stock and limit allow. The order keeps its id, and its key where that is known: whoever bought
-- again under the key has another order by now, and gets no second one. An order under the key whose units were given
-- back is what the key is answered with; then the claim is made without one.
--
-- KEYS  1 fence  2 clock  3 seq  4 outbox  5 touched  6 sale  7 claims of the sale
-- ARGV  1 fence of the caller  2 sale id  3 epoch of the caller
--       4 the claims one behind the other, 29 bytes each: key digest (16, zeros if not known), order id head (4),
--         quantity (3), state 0 (1), sequence (5)
--       5… the uid of each order
-- Reply {'OK', codes}; codes: a letter for each order
--         C claimed again   H held already   K another order is held under the key
--         L above the limit   S not enough left   N no such sale   A the sale is archived: its claims are gone
--       {'NO_FENCE'} | {'FOREIGN', fence} | {'STALE_EPOCH', epoch} | {'FUTURE_EPOCH', epoch}
--@include fence

local FIRST = 5 -- index of the first order's uid in ARGV
local CLAIM_BYTES = 29
local NO_KEY = string.rep('\0', 16)

local state_of = redis.call('MGET', KEYS[1], KEYS[2], KEYS[3])
if state_of[1] ~= ARGV[1] then
  return refusal(state_of[1], ARGV[1])
end
local last = tonumber(state_of[3])
if not last then
  return damaged('the ledger has a fence but no sequence')
end
local sale = redis.call('HMGET', KEYS[6], 'state', 'remaining', 'claimed', 'accepted', 'limit', 'reclaimed')
local missing = not sale[1] or sale[1] == 'archived'
for i = 2, missing and 0 or 5 do
  if not tonumber(sale[i]) then
    return damaged('sale ' .. ARGV[2] .. ' lacks a number')
  end
end
local remaining, limit = tonumber(sale[2]) or 0, tonumber(sale[5]) or 0
local entries = #ARGV - FIRST + 1
local before = redis.call('HMGET', KEYS[7], unpack(ARGV, FIRST))

local sub = string.sub
local codes, writes = {}, {}
local latest = {}
local units, orders = 0, 0
for i = 1, entries do
  local uid, claim = ARGV[FIRST + i - 1], sub(ARGV[4], CLAIM_BYTES * (i - 1) + 1, CLAIM_BYTES * i)
  local claims = latest[uid] or before[i] or ''
  local quantity = struct.unpack('>I3', claim, 21)
  local key = sub(claim, 1, 16)
  local code
  local held = 0
  for at = 1, #claims, CLAIM_BYTES do
    if sub(claims, at + 16, at + 19) == sub(claim, 17, 20) and sub(claims, at + 24, at + 28) == sub(claim, 25, 29) then
      code = 'H'
      break
    end
    local is_held = string.byte(claims, at + 23) == 0
    if is_held then
      held = held + struct.unpack('>I3', claims, at + 20)
    end
    if key ~= NO_KEY and sub(claims, at, at + 15) == key then
      if is_held then
        code = 'K' -- unless this very order follows
      else
        claim = NO_KEY .. sub(claim, 17)
      end
    end
  end
  if missing then
    code = sale[1] and 'A' or 'N'
  elseif code then
    -- the ledger knows this order, or another one of this key
  elseif held + quantity > limit then
    code = 'L'
  elseif remaining < quantity then
    code = 'S'
  else
    code = 'C'
    remaining = remaining - quantity
    units = units + quantity
    orders = orders + 1
    latest[uid] = claims .. claim
    writes[#writes + 1] = uid
    writes[#writes + 1] = latest[uid]
  end
  codes[i] = code
end

if orders > 0 then
  local now = ledger_time(state_of[2])
  local seq = last + 1
  -- These two first, in this order: a key of the wrong type stops the script before anything counts.
  redis.call('ZADD', KEYS[5], seq, ARGV[2])
  redis.call('XADD', KEYS[4], ARGV[3] .. '-' .. seq,
    'v', '1', 'k', 'reclaimed', 's', ARGV[2], 'a', now, 'o', orders)
  redis.call('HSET', KEYS[7], unpack(writes))
  redis.call('HSET', KEYS[6], 'remaining', remaining, 'claimed', sale[3] + units, 'accepted', sale[4] + orders,
    'reclaimed', (tonumber(sale[6]) or 0) + orders)
  redis.call('MSET', KEYS[2], now, KEYS[3], seq)
end
return {'OK', table.concat(codes)}
