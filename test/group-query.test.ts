import { expect, test } from 'vitest'
import { openWorld, until, using } from './world.ts'

test('members follow a query: batch, tags, firmware; joining and leaving are as by hand', { timeout: 120_000 }, async () => {
  const world = await openWorld()
  try {
    const { client } = world
    const machines = await Promise.all(['GW-1', 'GW-2', 'GW-3'].map(async (serial) => await world.simulated(serial)))
    const [one, two, three] = machines
    if (one === undefined || two === undefined || three === undefined) throw new Error('three boards')
    const members = async (id: string): Promise<readonly string[]> =>
      (await client.call('group.members', { params: { id } })).items.map(({ device }) => String(device)).toSorted()
    const tag = async (id: string, tags: Record<string, string | null>) => await client.call('device.tag', { params: { id }, body: { tags } })

    await client.call('group.create', { body: { id: 'berlin' as never, query: 'batch=batch-1 AND tag.site=berlin' } })
    await client.call('group.create', { body: { id: 'current' as never, query: 'release=gateway/1.0.0' } })
    // A batch that comes later is followed; nobody has the tag yet, and nobody runs anything.
    await world.enlist([one, two], 'plant')
    expect(await members('berlin')).toEqual([])
    expect((await tag('gw-1', { site: 'berlin', floor: '2' })).tags).toEqual({ site: 'berlin', floor: '2' })
    expect((await tag('gw-2', { site: 'hamburg' })).tags).toEqual({ site: 'hamburg' })
    expect(await members('berlin')).toEqual(['gw-1'])
    expect((await client.call('device.show', { params: { id: 'gw-1' } })).tags).toEqual({ site: 'berlin', floor: '2' })

    // By hand: no more.
    await expect(client.call('group.add', { params: { id: 'berlin' }, body: { devices: ['gw-2' as never] } })).rejects.toMatchObject({ code: 'conflict' })
    await expect(client.call('group.remove', { params: { id: 'berlin', device: 'gw-1' } })).rejects.toMatchObject({ code: 'conflict' })
    await expect(client.call('group.query', { params: { id: 'berlin' }, body: { query: 'owner=me' } })).rejects.toMatchObject({ code: 'malformed' })
    await expect(tag('gw-1', { Site: 'x' })).rejects.toMatchObject({ code: 'malformed' })

    // Keys come and go with the tag.
    await client.call('key.create', { body: { id: 'site' as never, protection: 'sealed' } })
    await client.call('key.grant', { params: { id: 'site' }, body: { group: 'berlin' as never } })
    const [first, second] = [world.agent(one), world.agent(two)]
    await until('the first uses it', () => using([first], 'site', 1))
    await until('both are where their firmware puts them', async () => (await members('current')).length === 2)
    expect(second.status().current).toEqual({})
    await tag('gw-2', { site: 'berlin' })
    await until('so does the second', () => using([second], 'site', 1))
    await tag('gw-1', { site: null })
    await until('the second uses the next epoch, without the first', () => using([second], 'site', 2) && first.status().holdings.length === 0, 60_000)
    expect(await members('berlin')).toEqual(['gw-2'])

    // Another query, another fleet.
    await client.call('group.query', { params: { id: 'berlin' }, body: { query: 'tag.floor=2,3 AND serial!=GW-2' } })
    expect(await members('berlin')).toEqual(['gw-1'])
    await client.call('group.query', { params: { id: 'berlin' }, body: { query: null } })
    await client.call('group.add', { params: { id: 'berlin' }, body: { devices: ['gw-2' as never] } })
    expect(await members('berlin')).toEqual(['gw-1', 'gw-2'])
    expect(await client.call('group.show', { params: { id: 'current' } })).toMatchObject({ query: 'release=gateway/1.0.0', members: 2 })
  } finally {
    await world.stop()
  }
})
