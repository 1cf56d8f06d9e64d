-- LIMIT: requests and tokens a minute of one API key, as two leaky buckets (GCRA). A bucket is one number: the time at
-- which it will be full again, in microseconds of the server's clock. What is taken moves that time on, at 60 s for a
-- minute's worth; whoever would move it more than 60 s ahead of now is refused. So a full bucket lets one minute's worth
-- through at once, and then the rate holds over any time.
-- A call that is sent again after a lost reply counts twice; that runs off by itself within a minute.
-- Stands alone, without the prelude.
--
-- KEYS: 1 the hash with both buckets, fields r and t
-- ARGV: 1 'reserve', 2 requests a minute or 0, 3 tokens a minute or 0, 4 tokens to reserve
--       returns {verdict, retry after in us, requests left, until full in us, tokens left, until full in us, receipt};
--       verdict 0 taken | 1 too many requests | 2 too many tokens: nothing was taken
-- ARGV: 1 'settle', 2 requests a minute or 0, 3 tokens a minute, 4 tokens reserved, 5 tokens used, 6 receipt
-- returns the same, with the verdict 0
local MINUTE = 60000000
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local rpm, tpm, reserved = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
if tpm > 0 then reserved = math.min(reserved, tpm) end   -- more than a minute's worth would never fit
local stored = redis.call('HMGET', KEYS[1], 'r', 't')
local requests, tokens = math.max(tonumber(stored[1] or now), now), math.max(tonumber(stored[2] or now), now)
local receipt, verdict, wait = 0, 0, 0

local function cost(amount, per_minute)
  return math.ceil(amount * MINUTE / per_minute)
end

local function refuse_beyond_a_minute(at, code)
  local late = at - now - MINUTE
  if late > wait then verdict, wait = code, late end
end

if ARGV[1] == 'settle' then
  receipt = tonumber(ARGV[6])
  local difference = cost(tonumber(ARGV[5]) - reserved, tpm)
  -- Only what has not run off since can be given back: the rest would be others' debt.
  tokens = math.max(now, tokens + math.max(difference, -math.max(0, receipt - now)))
else
  local r = rpm > 0 and requests + cost(1, rpm) or now
  local t = tpm > 0 and tokens + cost(reserved, tpm) or now
  refuse_beyond_a_minute(r, 1)
  refuse_beyond_a_minute(t, 2)
  if verdict == 0 then requests, tokens, receipt = r, t, t end
end

local full = math.max(requests, tokens)
if full > now then
  redis.call('HSET', KEYS[1], 'r', string.format('%.0f', requests), 't', string.format('%.0f', tokens))
  redis.call('PEXPIRE', KEYS[1], math.ceil((full - now) / 1000))
else
  redis.call('DEL', KEYS[1])
end

local function left(at, per_minute)
  return math.max(0, math.floor((MINUTE - (at - now)) * per_minute / MINUTE))
end
return {verdict, wait, left(requests, rpm), requests - now, left(tokens, tpm), tokens - now, receipt}
