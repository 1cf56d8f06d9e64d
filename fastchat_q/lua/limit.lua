-- LIMIT: what one API key may still use: requests and tokens a minute, and tokens ever.
-- A minute's are two leaky buckets (GCRA). A bucket is one number: the time at
-- which it will be full again, in microseconds of the server's clock. What is taken moves that time on, at 60 s for a
-- minute's worth; whoever would move it more than 60 s ahead of now is refused. So a full bucket lets one minute's worth
-- through at once, and then the rate holds over any time.
-- The quota is a counter of what was used, reservations included. As long as anything is left a request may begin; it
-- reserves no more than that, and pays what it used when it ends: the one that crosses the line is finished.
-- A call that is sent again after a lost reply counts twice; of the buckets that runs off by itself within a minute.
-- Stands alone, without the prelude.
--
-- KEYS: 1 the hash with both buckets, fields r and t, 2 the counter of the quota
-- ARGV: 1 'reserve', 2 requests a minute or 0, 3 tokens a minute or 0, 4 tokens to reserve, 5 quota or 0
--       returns {verdict, retry after in us, requests left, until full in us, tokens left, until full in us, receipt,
--       taken of the quota}; verdict 0 taken | 1 too many requests | 2 too many tokens | 3 no quota left: nothing taken
-- ARGV: 1 'settle', 2 requests a minute or 0, 3 tokens a minute or 0, 4 tokens reserved, 5 quota or 0, 6 tokens used,
--       7 receipt, 8 taken of the quota
-- returns the same, with the verdict 0
local MINUTE = 60000000
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local rpm, tpm, reserved, quota = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local asked = reserved
if tpm > 0 then reserved = math.min(reserved, tpm) end   -- more than a minute's worth would never fit
local stored = redis.call('HMGET', KEYS[1], 'r', 't')
local requests, tokens = math.max(tonumber(stored[1] or now), now), math.max(tonumber(stored[2] or now), now)
local receipt, verdict, wait, taken = 0, 0, 0, 0

local function cost(amount, per_minute)
  return math.ceil(amount * MINUTE / per_minute)
end

local function refuse_beyond_a_minute(at, code)
  local late = at - now - MINUTE
  if late > wait then verdict, wait = code, late end
end

if ARGV[1] == 'settle' then
  local used = tonumber(ARGV[6])
  receipt, taken = tonumber(ARGV[7]), tonumber(ARGV[8])
  if tpm > 0 then
    -- Only what has not run off since can be given back: the rest would be others' debt.
    tokens = math.max(now, tokens + math.max(cost(used - reserved, tpm), -math.max(0, receipt - now)))
  end
  if quota > 0 then
    local counted = tonumber(redis.call('GET', KEYS[2]) or 0)
    redis.call('SET', KEYS[2], string.format('%.0f', math.max(0, counted + used - taken)))
  end
else
  local r = rpm > 0 and requests + cost(1, rpm) or now
  local t = tpm > 0 and tokens + cost(reserved, tpm) or now
  refuse_beyond_a_minute(r, 1)
  refuse_beyond_a_minute(t, 2)
  local counted = quota > 0 and tonumber(redis.call('GET', KEYS[2]) or 0) or 0
  if quota > 0 and counted >= quota then verdict, wait = 3, 0 end
  if verdict == 0 then
    requests, tokens, receipt = r, t, t
    if quota > 0 then
      taken = math.min(asked, quota - counted)
      redis.call('SET', KEYS[2], string.format('%.0f', counted + taken))
    end
  end
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
return {verdict, wait, left(requests, rpm), requests - now, left(tokens, tpm), tokens - now, receipt, taken}
