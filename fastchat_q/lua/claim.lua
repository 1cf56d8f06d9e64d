-- CLAIM: a worker with free slots takes the first jobs of the lines, lane by lane. XREADGROUP inside the script leaves no
-- moment between «delivered» and «claimed».
--
-- Suspects (jobs that lost two workers) run alone: one worker at a time is their ward, takes nothing else until it is
-- empty, then exactly one of them.
--
-- Headroom: while tenants are away and expected back, a worker's last free slots are for tenants that do not run more than
-- an equal share of what runs: a light tenant finds a slot free at once, beside one that could fill them all. Who has jobs
-- in line needs none kept, for it gets its turn by its tags: tenants that are all backlogged use every slot.
--
-- ARGV: 1 worker id, 2 jobs it runs, 3 lease in ms, 4 nonce, 5 ms a ward stays one, 6 headroom in slots, 7.. pairs of a
--       lane and how many of it at the most, in the order of service
-- returns {code, {id, fence, attempt, n, lane, retries, spec}...}; code 0 ok | 1 only jobs that could not be taken were
--         seen within the bound, call again | 2 the queue is paused | 3 take nothing until all that runs has ended |
--         4 jobs wait, but the slots that are free are kept
local ROUNDS, PROMOTED = 64, 32
local worker, busy, lease, nonce, headroom = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[6])
allow_at_maxmemory()
local t, out = now(), {0}
if redis.call('GET', MODE) == 'paused' then return {2} end
promote(t, PROMOTED)

local function take(id, score, lane, sid)
  redis.call('ZREM', WAIT[lane], id)   -- whatever becomes of it, it does not wait here any more
  local h = redis.call('HMGET', JOB .. id, 'state', 'attempt', 'start_by_ms', 'deadline_ms', 'tenant', 'parallel', 'n', 'spec',
    'retries')
  if h[1] ~= 'queued' then return unstream(lane, sid) end
  local first, deadline, tenant, parallel = h[2] == '0', tonumber(h[4]), h[5], tonumber(h[6])
  if deadline <= t or (first and h[7] == '0' and tonumber(h[3]) <= t) then
    unstream(lane, sid)
    return terminal(id, 'expired', deadline <= t and 'deadline' or 'queue deadline', '')
  end
  if parallel > 0 and tonumber(redis.call('HGET', RUNNING, tenant) or 0) >= parallel then
    redis.call('ZADD', PARKED .. tenant, score, id)
    return unstream(lane, sid)
  end
  local attempt = tonumber(h[2]) + 1
  local fence = attempt .. '-' .. nonce
  redis.call('HSET', JOB .. id, 'state', 'running', 'fence', fence, 'worker', worker, 'sid', sid, 'start_ms', t,
    'attempt', attempt, 'a' .. slot_of(attempt), t .. ' ' .. worker)
  if attempt >= ATTEMPTS_KEPT then redis.call('HDEL', JOB .. id, 'e' .. slot_of(attempt)) end
  redis.call('ZADD', LEASE, t + lease, id)
  if first then redis.call('ZADD', LIVE, deadline, id) end
  count(QUEUED, tenant, -1)
  redis.call('HINCRBY', RUNNING, tenant, 1)
  out[#out + 1] = {id, fence, attempt, tonumber(h[7]) or 0, lane, tonumber(h[9]) or 0, h[8]}   -- a nil would end the reply here
end

local left, kept = 0, false
for l = 7, #ARGV, 2 do left = math.max(left, tonumber(ARGV[l + 1])) end

-- How many of the first `wanted` jobs of the line may have slots, as far as headroom goes.
local function admitted(lane, wanted)
  local away = headroom > 0 and redis.call('ZCOUNT', AWAY, '(' .. t, '+inf') or 0
  if away == 0 then return wanted end
  local free = left - (#out - 1)
  if free > headroom then return math.min(wanted, free - headroom) end
  local first = redis.call('ZRANGE', WAIT[lane], 0, 0)[1]
  local tenant = first and redis.call('HGET', JOB .. first, 'tenant')
  if not tenant then return 1 end
  local tenants = redis.call('HLEN', QUEUED) + away
  if tonumber(redis.call('HGET', RUNNING, tenant) or 0) * tenants <= redis.call('ZCARD', LEASE) then return 1 end
  kept = true
  return 0
end

local function serve(lane, limit)
  local goal = #out + limit
  for round = 1, ROUNDS do
    local wanted = goal - #out
    if wanted > 0 and lane ~= 'sus' then wanted = admitted(lane, wanted) end
    if wanted <= 0 then return end
    local line = redis.call('ZRANGE', WAIT[lane], 0, wanted - 1, 'WITHSCORES')
    local jobs = #line / 2
    if jobs == 0 then return end
    local sids = read(lane, worker, jobs)
    if #sids < jobs then   -- entries were trimmed: the line is the truth
      for i = #sids + 1, jobs do post(lane, line[2 * i - 1]) end
      for _, sid in ipairs(read(lane, worker, jobs - #sids)) do sids[#sids + 1] = sid end
    end
    for i = 1, jobs do take(line[2 * i - 1], line[2 * i], lane, sids[i]) end
    local tag = tonumber(line[#line])
    if tag > tonumber(redis.call('HGET', TAGS[lane], 'V') or 0) then redis.call('HSET', TAGS[lane], 'V', line[#line]) end
  end
  if #out == 1 then out[1] = 1 end
end

local ward, at_work = string.match(redis.call('GET', WARD) or '', '^(%S+) (%d)$')
if ward == worker and at_work == '1' and busy > 0 then   -- what it runs is a suspect
  redis.call('PEXPIRE', WARD, ARGV[5])
  return {3}
end
if redis.call('ZCARD', WAIT['sus']) > 0 then
  if not ward or ward == worker or (busy == 0 and at_work == '0') then   -- who is idle need not wait for who is not
    if busy > 0 then
      redis.call('SET', WARD, worker .. ' 0', 'PX', ARGV[5])
      return {3}
    end
    serve('sus', 1)
    if #out > 1 then
      redis.call('SET', WARD, worker .. ' 1', 'PX', ARGV[5])
      return out
    end
    redis.call('DEL', WARD)   -- those that waited had ended, or may not run now
  end
end
for l = 7, #ARGV, 2 do
  serve(ARGV[l], math.min(tonumber(ARGV[l + 1]), left - (#out - 1)))
end
if kept and out[1] == 0 then out[1] = 4 end
return out
