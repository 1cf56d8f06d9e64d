-- CLAIM: a worker with free slots takes jobs: first those that were handed back, then the stream, lane by lane.
-- XREADGROUP inside the script leaves no moment between «delivered» and «claimed».
--
-- ARGV: 1 worker id, 2 free slots, 3 lease in ms, 4 nonce, 5.. lanes in the order of service
-- returns {more, {id, fence, attempt, n, spec}...}; more = 1: only stale entries were seen within the bound, call again
local READS = 64   -- bound on the reads of one call, however many cancelled entries lie ahead
local worker, left, lease, nonce = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
allow_at_maxmemory()
local t, out = now(), {0}

local function take(id, lane, sid)
  local h = redis.call('HMGET', JOB .. id, 'state', 'sid', 'deadline_ms', 'n', 'spec')
  if h[1] ~= 'queued' or h[2] ~= sid then return false end
  if tonumber(h[3]) <= t then
    redis.call('ZADD', WAIT[lane], -1, id)   -- it is delivered by now, so its entry may go
    terminal(id, 'expired', 'deadline', '')
    return true
  end
  local attempt = redis.call('HINCRBY', JOB .. id, 'attempt', 1)
  local fence = attempt .. '-' .. nonce
  redis.call('HSET', JOB .. id, 'state', 'running', 'fence', fence, 'worker', worker, 'start_ms', t)
  redis.call('ZREM', WAIT[lane], id)
  redis.call('ZADD', LEASE, t + lease, id)
  out[#out + 1] = {id, fence, attempt, tonumber(h[4]), h[5]}
  left = left - 1
  return true
end

local function take_handed_back(lane)
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', WAIT[lane], '-inf', '(0', 'LIMIT', 0, left)) do
    local sid = redis.call('HGET', JOB .. id, 'sid')
    if sid then
      redis.pcall('XCLAIM', STREAM[lane], GROUP, worker, 0, sid, 'JUSTID')   -- may be gone: the hash is the truth
    end
    if not (sid and take(id, lane, sid)) then redis.call('ZREM', WAIT[lane], id) end
  end
end

local function read(lane)
  local reply = redis.pcall('XREADGROUP', 'GROUP', GROUP, worker, 'COUNT', left, 'STREAMS', STREAM[lane], '>')
  if reply and reply.err then   -- FLUSHALL, XGROUP DESTROY, or a model's first worker
    ensure_group(lane)
    reply = redis.call('XREADGROUP', 'GROUP', GROUP, worker, 'COUNT', left, 'STREAMS', STREAM[lane], '>')
  end
  return reply and reply[1][2] or {}
end

for l = 5, #ARGV do
  local lane = ARGV[l]
  if left > 0 then take_handed_back(lane) end
  local reads = 0
  while left > 0 do
    if reads == READS then out[1] = 1; break end
    reads = reads + 1
    local entries = read(lane)
    if #entries == 0 then break end
    for _, entry in ipairs(entries) do
      local sid, fields = entry[1], entry[2]
      if not (fields and fields[1] == 'j' and take(fields[2], lane, sid)) then
        unstream(lane, sid)   -- cancelled while it waited, or a foreign entry
      end
    end
  end
end
return out
