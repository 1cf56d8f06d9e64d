-- EMIT: tokens of many jobs, appended to their logs and published, in one call a decode step. A token exists if and
-- only if it is in the log; the channel is a hint. Explicit ids 0-<n> let XADD itself refuse a repeat or a reorder.
--
-- ARGV: 1 lease in ms, then per job: id, fence, n after this chunk, tokens in it, payload (one line of JSON)
-- returns per job 1 ok | 0 lost (fenced out, cancelled, ended) | 2 duplicate of a call whose reply was lost | 3 gap |
--         4 ok, but nobody listens who should | 5 damaged: somebody else wrote into its log or record, and it takes no
--         token any more; FINISH with the count before this chunk ends it
-- What is wrong with one job is answered for that job alone: an error would drop all jobs of the call.
allow_at_maxmemory()
local t, lease, out, lines = now(), tonumber(ARGV[1]), {}, {}

-- Whether an error is about what the key holds (its type, its last id), and not about the server.
local function of_the_key(err)
  return string.find(err, 'WRONGTYPE', 1, true) or string.find(err, ' ID', 1, true)
end

for i = 2, #ARGV, 5 do
  local id, fence, n, k, payload = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3]), ARGV[i + 4]
  local h = redis.pcall('HMGET', JOB .. id, 'state', 'fence', 'n', 'inbox', 'deadline_ms')
  local have, deadline, status = tonumber(h[3]), tonumber(h[5]), nil
  if h.err then
    if not of_the_key(h.err) then return h end
    redis.call('ZREM', LEASE, id)   -- there is no such job any more, and who goes by the leases would stumble over it
    status = 5
  elseif h[1] ~= 'running' or h[2] ~= fence or fence == '' then status = 0
  elseif not have then
    redis.call('HSET', JOB .. id, 'n', n - k)   -- what its writer knows of, so that FINISH can end it
    status = 5
  elseif have >= n then status = 2
  elseif have ~= n - k then status = 3
  elseif not deadline or not h[4] then status = 5
  else
    local added = redis.pcall('XADD', LOG .. id, '0-' .. n, 'k', k, 'd', payload)
    if type(added) == 'table' then
      if not of_the_key(added.err) then return added end
      status = 5
    else
      if have == 0 then redis.pcall('PEXPIREAT', LOG .. id, deadline + SAFETY_MS) end   -- a log never outlives its job
      redis.call('HSET', JOB .. id, 'n', n)
      redis.call('ZADD', LEASE, t + lease, id)
      local inbox = lines[h[4]]
      if not inbox then inbox = {at = {}}; lines[h[4]] = inbox end
      inbox.at[#inbox.at + 1] = #out + 1
      inbox[#inbox + 1] = id .. ' ' .. n .. ' ' .. k .. ' ' .. payload
      status = 1
    end
  end
  if (status == 0 or status == 3) and have and have < n - k then
    redis.call('HSET', JOB .. id, 'recut', '1')   -- a failover lost tokens: they may come again in other entries
  end
  out[#out + 1] = status
end
for inbox, rows in pairs(lines) do
  if publish(inbox, table.concat(rows, '\n')) == 0 and not string.find(inbox, '*', 1, true) then
    for _, i in ipairs(rows.at) do out[i] = 4 end
  end
end
return out
