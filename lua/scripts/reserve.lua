#!lua
-- Decides a batch of purchases of one sale.
--
-- KEYS  1 fence  2 clock  3 seq  4 outbox  5 touched  6 sale  7 claims of the sale
-- ARGV  1 fence of the caller  2 sale id  3 epoch of the caller
--       4 the quantity of every entry, or 0 where they differ
--       5 for each entry, one behind the other, 24 bytes: key digest (16), order id head (4, big endian),
--         quantity (3, big endian), state 0 (1)
--       6 for each entry its line of the outbox record: "HEAD QUANTITY UID[ TRACEPARENT]\n", HEAD the nine digits
--         of the order id
--       7 '1' if a user has several entries, else '0'
--       8… the uid of each entry
-- Reply {'OK', seq, now, revision, codes, extras}
--         codes: a letter for each entry
--           A accepted: orders are numbered in this order, the last of them is seq
--           R replay; extras has the order id (4 bytes head, 5 bytes sequence)
--           K key reused with another quantity   N no such sale   P paused
--           T not started; extras has the start (6 bytes, ms)     E ended
--           L above the user's limit             S sold out
--           I fewer left than asked; extras has what is left (5 bytes)
--       {'NO_FENCE'} | {'FOREIGN', fence} | {'STALE_EPOCH', epoch} | {'FUTURE_EPOCH', epoch}
--       {'SEQUENCE_EXHAUSTED'}
-- A claim is head .. sequence (5 bytes), 29 bytes; the claims of a user stand one after the other.
--@include fence

local FIRST = 8 -- index of the first entry's uid in ARGV
local HEAD_BYTES = 24
local CLAIM_BYTES = 29
-- How many claims a user may leave behind: some beyond the limit, for units that were given back, but never so
-- many that reading them slows everybody down.
local SPARE_CLAIMS = 64
local MAX_CLAIMS = 1024
local MAX_SEQ = 9999999999

local state_of = redis.call('MGET', KEYS[1], KEYS[2], KEYS[3])
if state_of[1] ~= ARGV[1] then
  return refusal(state_of[1], ARGV[1])
end
local last = tonumber(state_of[3])
if not last then
  return damaged('the ledger has a fence but no sequence')
end
local now = ledger_time(state_of[2])
local seq = last
local entries = #ARGV - FIRST + 1
if seq + entries > MAX_SEQ then
  return {'SEQUENCE_EXHAUSTED'}
end

local sale = redis.call('HMGET', KEYS[6],
  'state', 'starts', 'ends', 'limit', 'remaining', 'claimed', 'accepted', 'revision', 'terms')
local starts, ends, limit = tonumber(sale[2]), tonumber(sale[3]), tonumber(sale[4])
local remaining, claimed_before = tonumber(sale[5]), tonumber(sale[6])
local accepted_before, revision = tonumber(sale[7]), tonumber(sale[8])
if not sale[1] then
  revision = 0
elseif not (starts and limit and remaining and claimed_before and accepted_before and revision and sale[9]) then
  return damaged('sale ' .. ARGV[2] .. ' lacks a field')
end
local closed
if not sale[1] or sale[1] == 'archived' then
  closed = 'N'
elseif sale[1] == 'paused' then
  closed = 'P'
elseif now < starts then
  closed = 'T'
elseif sale[1] == 'ended' or (ends and now >= ends) then
  closed = 'E'
end

local most_claims = math.min((limit or 0) + SPARE_CLAIMS, MAX_CLAIMS) * CLAIM_BYTES
-- What each entry's user had claimed; each place takes the entry's code once it is read: a table of its own would be
-- grown, which costs Redis more than the rest of the loop.
local before = redis.call('HMGET', KEYS[7], unpack(ARGV, FIRST))
local codes = before

local sub, byte, char, floor = string.sub, string.byte, string.char, math.floor
local pack, unpack_bytes = struct.pack, struct.unpack
local same_quantity, heads = tonumber(ARGV[4]), ARGV[5]
local extras, extra = {}, 0
local writes, written = {}, 0
local accepted, units = 0, 0
local high -- the first four bytes of the sequence, the same for 256 orders
local latest = ARGV[7] == '1' and {} -- claims of users that this batch has already changed, where that matters

for i = 1, entries do
  local uid = ARGV[FIRST + i - 1]
  local head_at = HEAD_BYTES * (i - 1) + 1
  local quantity = same_quantity
  if quantity == 0 then
    quantity = unpack_bytes('>I3', heads, head_at + 20)
  end
  local claims = latest and latest[uid] or before[i]
  local held = 0
  local code
  if claims then
    local digest = sub(heads, head_at, head_at + 15)
    for at = 1, #claims, CLAIM_BYTES do
      local claimed = unpack_bytes('>I3', claims, at + 20)
      if sub(claims, at, at + 15) == digest then
        if claimed == quantity then
          code = 'R'
          extra = extra + 1
          extras[extra] = sub(claims, at + 16, at + 19) .. sub(claims, at + 24, at + 28)
        else
          code = 'K'
        end
        break
      end
      if byte(claims, at + 23) == 0 then
        held = held + claimed
      end
    end
    if not code and #claims >= most_claims then
      held = limit
    end
  end
  if code then
    -- decided by an earlier acceptance, whatever the sale has become since
  elseif closed then
    code = closed
    if closed == 'T' then
      extra = extra + 1
      extras[extra] = pack('>I6', starts)
    end
  elseif held + quantity > limit then
    code = 'L'
  elseif remaining == 0 then
    code = 'S'
  elseif remaining < quantity then
    code = 'I'
    extra = extra + 1
    extras[extra] = pack('>I5', remaining)
  else
    code = 'A'
    remaining = remaining - quantity
    units = units + quantity
    seq = seq + 1
    local low = seq % 256
    if low == 0 or not high then
      high = pack('>I4', floor(seq / 256))
    end
    local claim = sub(heads, head_at, head_at + HEAD_BYTES - 1) .. high .. char(low)
    if claims then
      claim = claims .. claim
    end
    if latest then
      latest[uid] = claim
    end
    writes[written + 1] = uid
    written = written + 2
    writes[written] = claim
    accepted = accepted + 1
  end
  codes[i] = code
end

if accepted > 0 then
  local lines = ARGV[6]
  if accepted < entries then
    local all, kept = string.gmatch(lines, '[^\n]*\n'), {}
    for i = 1, entries do
      local line = all()
      if codes[i] == 'A' then
        kept[#kept + 1] = line
      end
    end
    lines = table.concat(kept)
  end
  -- These two first, in this order: a key of the wrong type stops the script before anything counts.
  redis.call('ZADD', KEYS[5], seq, ARGV[2])
  redis.call('XADD', KEYS[4], ARGV[3] .. '-' .. seq,
    'v', '1', 'k', 'orders', 's', ARGV[2], 't', sale[9], 'a', now, 'o', lines)
  redis.call('HSET', KEYS[7], unpack(writes))
  redis.call('HSET', KEYS[6], 'remaining', remaining,
    'claimed', claimed_before + units, 'accepted', accepted_before + accepted)
  redis.call('MSET', KEYS[2], now, KEYS[3], seq)
end
local letters = accepted == entries and string.rep('A', entries) or table.concat(codes)
return {'OK', seq, now, revision, letters, table.concat(extras)}
